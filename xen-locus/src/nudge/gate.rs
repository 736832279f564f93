//! The gate: code in the arena that one of the guest's functions runs through at its entry, and that does something once.
//!
//! It wakes threads as a signal would, as the kernel's own livepatch does for threads that sleep in a function that is to be
//! replaced (kernel/livepatch/transition.c: `klp_send_signals`). It is at the entry of the timer interrupt's handler:
//! interrupts are off there, no lock is held, RCU watches, and timers wake threads from there all the time.

use iced_x86::code_asm::{
    dword_ptr, eax, ecx, edi, esi, r10, r11, r12, r12d, r8, r9, rax, rbx, rcx, rdi, rdx, rsi,
    CodeAssembler,
};
use iced_x86::{Decoder, DecoderOptions, FlowControl, IcedError};
use locus_guest::addr::Gva;
use locus_guest::fetch;
use locus_kernel::btf::prototype::{Prototype, Type};
use locus_kernel::btf::{Btf, TypeKind};
use locus_kernel::Kernel;

use crate::error::{Error, Result};
use crate::link::fixups::moved::moved;
use crate::x86::{self, JUMP};

/// The function at whose entry the gate is (kernel/time/hrtimer.c).
pub const FUNCTION: &str = "hrtimer_interrupt";
/// A function that a kernel has if it checks which locks are held (`CONFIG_LOCKDEP`; kernel/locking/lockdep.c).
const LOCKDEP: &str = "lock_is_held_type";
/// Most threads that are woken at once, because the interrupt must not take long.
pub const THREADS_MAX: usize = 128;
/// Offset of the threads in the data, in bytes.
const THREADS: usize = 16;
/// Length of one of them, in bytes.
const THREAD: i32 = 16;
/// Offset of the count of threads that were woken, in bytes.
const WOKEN: usize = 8;

/// What the gate does; the first word of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GateState {
    /// The next CPU that comes wakes the threads.
    Armed = 1,
    /// A CPU does so now.
    Busy = 2,
    /// All were tried.
    Done = 3,
}

/// A thread to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its id.
    pub pid: u32,
    /// Address of its `task_struct`: if another thread has the id by then, that one is left alone.
    pub task: Gva,
}

/// What the gate calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calls {
    /// `find_task_by_pid_ns`. Its callers must keep RCU from ending a grace period. With interrupts off they do.
    find: Gva,
    /// `init_pid_ns`.
    ids: Gva,
    /// `signal_wake_up_state`: sets `TIF_SIGPENDING` and wakes a thread whose sleep is interruptible.
    wake: Gva,
}

impl Calls {
    /// Those of `kernel`.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the kernel lacks one of them, or its type is another. Or
    /// it checks whether the callers of `signal_wake_up_state` hold a thread's `siglock`: the gate does not, and such a
    /// kernel would warn, panic if it was told to, and follow the null pointer `sighand` of a thread that exits.
    pub fn of(kernel: &Kernel<'_>) -> Result<Calls> {
        if kernel.symbols.addr(LOCKDEP).is_some() {
            return Err(Error::not_applicable(format!(
                "this kernel checks which locks are held (CONFIG_LOCKDEP: it has {LOCKDEP}), and would warn of a nudge, or panic"
            )));
        }
        let task = || Type::pointer_to_struct("task_struct");
        let named = |kind, name: &str| Type::Named(kind, name.to_owned());
        let find = Prototype {
            returns: task(),
            parameters: vec![
                named(TypeKind::Typedef, "pid_t"),
                Type::pointer_to_struct("pid_namespace"),
            ],
        };
        let wake = Prototype {
            returns: Type::Void,
            parameters: vec![task(), named(TypeKind::Int, "unsigned int")],
        };
        check_type(kernel.btf()?, "find_task_by_pid_ns", &find)?;
        check_type(kernel.btf()?, "signal_wake_up_state", &wake)?;
        Ok(Calls {
            find: kernel.function("find_task_by_pid_ns", 0)?,
            ids: kernel.symbols.need("init_pid_ns")?,
            wake: kernel.function("signal_wake_up_state", 0)?,
        })
    }
}

/// Refuses a function that is not called as `expected`.
fn check_type(btf: &Btf, name: &str, expected: &Prototype) -> Result<()> {
    let found = btf.prototype(name)?;
    if found == *expected {
        return Ok(());
    }
    Err(Error::not_applicable(format!(
        "{name}() of this kernel has an unexpected type: expected `{expected}`, found `{found}`"
    )))
}

/// The data of a gate that wakes `threads`. It is armed.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): there are more than [`THREADS_MAX`].
pub fn data(threads: &[Thread]) -> Result<Vec<u8>> {
    let count = u32::try_from(threads.len()).ok();
    let count = count.filter(|_| threads.len() <= THREADS_MAX);
    let count = count.ok_or_else(|| {
        let found = threads.len();
        Error::failed(format!(
            "{found} threads to be woken; expected at most {THREADS_MAX}"
        ))
    })?;
    let mut bytes = Vec::new();
    for word in [GateState::Armed as u32, count, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for thread in threads {
        bytes.extend(u64::from(thread.pid).to_le_bytes());
        bytes.extend(thread.task.0.to_le_bytes());
    }
    Ok(bytes)
}

/// How many threads were woken. `None` until all have been tried.
#[must_use]
pub fn woken(data: &[u8]) -> Option<u32> {
    let done = fetch::u32(data, 0)? == GateState::Done as u32;
    fetch::u32(data, WOKEN).filter(|_| done)
}

/// How many bytes of `code` at `at` a redirect displaces: whole instructions that do the same anywhere.
///
/// # Errors
/// A sentence: one of them branches, or is no instruction.
pub fn displaced(code: &[u8], at: Gva) -> std::result::Result<usize, String> {
    let mut len = 0;
    for i in Decoder::with_ip(64, code, at.0, DecoderOptions::NONE).iter() {
        if len >= JUMP {
            return Ok(len);
        }
        if i.is_invalid() || i.flow_control() != FlowControl::Next {
            return Err(format!(
                "expected instructions that can be moved, found {:?} at {}",
                i.code(),
                Gva(i.ip())
            ));
        }
        len += i.len();
    }
    if len >= JUMP {
        return Ok(len);
    }
    Err(format!("{len} bytes of code at {at}"))
}

/// The gate's code for the address `at`, with its data at `data`. `displaced` are the instructions at `from` that the
/// redirect overwrites.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): something is out of reach.
pub fn code(at: Gva, data: Gva, calls: Calls, displaced: &[u8], from: Gva) -> Result<Vec<u8>> {
    let odd = |why: String| Error::failed(format!("the gate can't be made: {why}"));
    let mut code = body(at, data, calls).map_err(|e| odd(e.to_string()))?;
    let here = |code: &[u8]| at.plus(code.len() as u64);
    code.extend(moved(displaced, from, here(&code)).map_err(odd)?);
    let back = from.plus(displaced.len() as u64);
    let jump = x86::jump(here(&code), back)
        .ok_or_else(|| odd(format!("{back} is out of reach of a jump from it")))?;
    code.extend(jump);
    Ok(code)
}

/// The code up to the displaced instructions.
fn body(at: Gva, data: Gva, calls: Calls) -> std::result::Result<Vec<u8>, IcedError> {
    // Registers that the kernel's functions may change and the interrupted function still needs.
    let kept = [rax, rcx, rdx, rsi, rdi, r8, r9, r10, r11, rbx, r12];
    let word = |offset: usize| data.plus(offset as u64).0;
    let mut a = CodeAssembler::new(64)?;
    let (mut each, mut next, mut done) = (a.create_label(), a.create_label(), a.create_label());
    let (mut restore, mut leave) = (a.create_label(), a.create_label());
    a.cmp(dword_ptr(word(0)), GateState::Armed as i32)?;
    a.jne(leave)?;
    for register in kept {
        a.push(register)?;
    }
    // Only one CPU goes on.
    a.mov(eax, GateState::Armed as u32)?;
    a.mov(ecx, GateState::Busy as u32)?;
    a.lock().cmpxchg(dword_ptr(word(0)), ecx)?;
    a.jne(restore)?;
    a.mov(rbx, word(THREADS).cast_signed())?;
    a.mov(r12d, dword_ptr(word(4)))?;
    a.set_label(&mut each)?;
    a.test(r12d, r12d)?;
    a.je(done)?;
    a.dec(r12d)?;
    a.mov(edi, dword_ptr(rbx))?;
    a.mov(rsi, calls.ids.0.cast_signed())?;
    a.call(calls.find.0)?;
    // An id that no thread has gives null, which is no thread's address.
    a.cmp(rax, iced_x86::code_asm::qword_ptr(rbx + 8))?;
    a.jne(next)?;
    a.mov(rdi, rax)?;
    a.xor(esi, esi)?;
    a.call(calls.wake.0)?;
    a.inc(dword_ptr(word(WOKEN)))?;
    a.set_label(&mut next)?;
    a.add(rbx, THREAD)?;
    a.jmp(each)?;
    a.set_label(&mut done)?;
    a.mov(dword_ptr(word(0)), GateState::Done as i32)?;
    a.set_label(&mut restore)?;
    for register in kept.into_iter().rev() {
        a.pop(register)?;
    }
    a.set_label(&mut leave)?;
    a.zero_bytes()?;
    a.assemble(at.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;
    use iced_x86::{Code, Mnemonic};
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    const AT: Gva = Gva(0xffff_ffff_ff60_2010);
    const DATA: Gva = Gva(0xffff_ffff_ff60_3000);
    const FROM: Gva = Gva(0xffff_ffff_8110_0005);
    const CALLS: Calls = Calls {
        find: Gva(0xffff_ffff_810a_0000),
        ids: Gva(0xffff_ffff_8245_0000),
        wake: Gva(0xffff_ffff_8108_0000),
    };
    /// push r15; push r14; push r13
    const PUSHES: [u8; 6] = [0x41, 0x57, 0x41, 0x56, 0x41, 0x55];

    fn decoded(code: &[u8]) -> Vec<iced_x86::Instruction> {
        Decoder::with_ip(64, code, AT.0, DecoderOptions::NONE)
            .iter()
            .collect()
    }

    #[test]
    fn a_kernel_that_checks_its_locks_is_not_nudged() {
        let mut fixture = Fixture::new();
        fixture.function(TEXT.0 + 0x1000, LOCKDEP, &[0xc3]);
        let memory = fixture.build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let error = Calls::of(&kernel).unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable);
        assert!(error.to_string().contains("CONFIG_LOCKDEP"), "{error}");
    }

    /// A kernel's types in which `wake` has these parameters: `signal_wake_up_state(task, NAME)`.
    fn types(wake: &str) -> Btf {
        let mut b = Blob::new();
        let int = b.int("int", 4);
        let own = b.int(wake, 4);
        let task = b.structure("task_struct", 4, &[("pid", int, 0)]);
        let task = b.refer("", TypeKind::Ptr, task);
        let wake = b.proto(0, &[("t", task), ("state", own)]);
        b.refer("signal_wake_up_state", TypeKind::Func, wake);
        Btf::new(b.bytes()).unwrap()
    }

    #[test]
    fn a_function_of_another_type_is_not_called() {
        let expected = Prototype {
            returns: Type::Void,
            parameters: vec![
                Type::pointer_to_struct("task_struct"),
                Type::Named(TypeKind::Int, "unsigned int".into()),
            ],
        };
        let check = |btf: &Btf, name: &str| check_type(btf, name, &expected);
        check(&types("unsigned int"), "signal_wake_up_state").unwrap();
        let error = check(&types("bool"), "signal_wake_up_state").unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable);
        let said = error.to_string();
        let words = "expected `void (struct task_struct *, unsigned int)`, found `void (struct task_struct *, bool)`";
        assert!(said.contains(words), "{said}");
        let error = check(&types("unsigned int"), "signal_wake_up").unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable);
    }

    #[test]
    fn it_ends_with_what_it_displaced_and_a_jump_behind_that() {
        let code = code(AT, DATA, CALLS, &PUSHES, FROM).unwrap();
        let (head, tail) = code.split_at(code.len() - PUSHES.len() - JUMP);
        assert_eq!(tail[..PUSHES.len()], PUSHES);
        let all = decoded(&code);
        let last = all.last().unwrap();
        assert_eq!(last.near_branch_target(), FROM.0 + PUSHES.len() as u64);
        // Nothing is armed: straight there.
        assert_eq!(all[1].mnemonic(), Mnemonic::Jne);
        assert_eq!(all[1].near_branch_target(), AT.0 + head.len() as u64);
        assert!(code.len() < 256, "{}", code.len());
    }

    #[test]
    fn it_gives_back_each_register_it_takes_and_calls_what_it_should() {
        let code = code(AT, DATA, CALLS, &PUSHES, FROM).unwrap();
        let all = decoded(&code);
        let of = |code: Code| {
            let found = all.iter().filter(move |i| i.code() == code);
            found.map(|i| i.op0_register()).collect::<Vec<_>>()
        };
        let (mut pushed, popped) = (of(Code::Push_r64), of(Code::Pop_r64));
        pushed.truncate(popped.len()); // those displaced come after
        pushed.reverse();
        assert_eq!(pushed, popped);
        // All that a function may change under the System V ABI, and two that it keeps.
        assert_eq!(popped.len(), 11);
        let calls = all.iter().filter(|i| i.mnemonic() == Mnemonic::Call);
        let calls: Vec<u64> = calls.map(|i| i.near_branch_target()).collect();
        assert_eq!(calls, [CALLS.find.0, CALLS.wake.0]);
        let words = all.iter().filter(|i| i.memory_displacement64() >= DATA.0);
        let words: Vec<u64> = words.map(|i| i.memory_displacement64() - DATA.0).collect();
        assert_eq!(words, [0, 0, 4, 8, 0]);
    }

    #[test]
    fn what_it_displaces_is_whole_and_leads_nowhere() {
        assert_eq!(displaced(&PUSHES, FROM), Ok(6));
        // mov eax, imm32; ret
        assert_eq!(displaced(&[0xb8, 1, 0, 0, 0, 0xc3], FROM), Ok(5));
        for code in [
            &[0x74, 0x10, 0x90, 0x90, 0x90, 0x90][..],
            &[0xe8, 0, 0, 0, 0],
            &[0x90, 0xc3, 0x90, 0x90, 0x90],
            &[0x41, 0x57, 0x41],
            &[0xcc; 8],
        ] {
            assert!(displaced(code, FROM).is_err(), "{code:02x?}");
        }
    }

    #[test]
    fn its_data_tell_when_all_is_done() {
        let thread = Thread {
            pid: 77,
            task: Gva(0xffff_8880_0000_1000),
        };
        data(&[thread; THREADS_MAX + 1]).unwrap_err();
        let mut bytes = data(&[thread; THREADS_MAX]).unwrap();
        assert_eq!(bytes.len(), THREADS + THREADS_MAX * 16);
        assert!(bytes.len() <= locus_guest::addr::PAGE_LEN);
        assert_eq!(woken(&bytes), None);
        bytes[0] = GateState::Done as u8;
        bytes[WOKEN] = 5;
        assert_eq!(woken(&bytes), Some(5));
        assert_eq!(woken(&[]), None);
    }
}
