//! The registers of a vCPU, out of the structures in which Xen gives them.

use locus_guest::addr::{Frame, Gva};
use locus_guest::Vcpu;
use xenctrl_sys::{self as sys, vcpu_guest_context_any_t};

use super::Error;

/// `EFER.LMA`: the CPU is in 64-bit mode.
const EFER_LMA: u64 = 1 << 10;
/// `CR4.LA57`: five levels of page tables.
const CR4_LA57: u64 = 1 << 12;

/// The registers of a PV guest's vCPU (`struct vcpu_guest_context`, xen/include/public/arch-x86/xen.h).
pub(super) fn vcpu_pv(vcpu: u32, online: bool, any: &vcpu_guest_context_any_t) -> Vcpu {
    // SAFETY: all members of the union are plain numbers, and the whole of it was filled or zeroed; Debian's
    // Xen has no 32-bit PV, and a 32-bit context read so shows no kernel address.
    let c = unsafe { &any.x64 };
    let [_, _, _, cr3, ..] = c.ctrlreg;
    let r = &c.user_regs;
    // SAFETY: the register unions hold views of one 64-bit register.
    let (rip, rsp) = unsafe { (r.__bindgen_anon_16.rip, r.__bindgen_anon_18.rsp) };
    // SAFETY: as above.
    let [rbp, rax, rdx, rdi, r10, r13] = unsafe {
        [
            r.__bindgen_anon_5.rbp,
            r.__bindgen_anon_11.rax,
            r.__bindgen_anon_13.rdx,
            r.__bindgen_anon_15.rdi,
            r.__bindgen_anon_8.r10,
            r.__bindgen_anon_3.r13,
        ]
    };
    let user = c.flags & u64::from(sys::VGCF_in_kernel) == 0;
    let (gs_base, gs_other) = if user {
        (c.gs_base_user, c.gs_base_kernel)
    } else {
        (c.gs_base_kernel, c.gs_base_user)
    };
    Vcpu {
        id: vcpu,
        online,
        rip: Gva(rip),
        rsp: Gva(rsp),
        rbp,
        rax,
        rdx,
        rdi,
        r10,
        r13,
        user,
        long_mode: true,
        root: Frame(cr3 >> 12),
        la57: false,
        gs_base: Gva(gs_base),
        gs_other: Gva(gs_other),
        entry: entry_point(c.event_callback_eip),
    }
}

/// An entry point, unless the kernel has not set it.
fn entry_point(entry: u64) -> Option<Gva> {
    (entry != 0).then_some(Gva(entry))
}

/// The registers of a PVH or HVM guest's vCPU (`struct hvm_hw_cpu`, xen/include/public/arch-x86/hvm/save.h).
pub(super) fn vcpu_hvm(vcpu: u32, c: &sys::hvm_hw_cpu) -> Vcpu {
    Vcpu {
        id: vcpu,
        online: true,
        rip: Gva(c.rip),
        rsp: Gva(c.rsp),
        rbp: c.rbp,
        rax: c.rax,
        rdx: c.rdx,
        rdi: c.rdi,
        r10: c.r10,
        r13: c.r13,
        user: c.cs_sel & 3 == 3,
        long_mode: c.msr_efer & EFER_LMA != 0,
        root: Frame((c.cr3 & locus_guest::space::PTE_FRAME) >> 12),
        la57: c.cr4 & CR4_LA57 != 0,
        gs_base: Gva(c.gs_base),
        gs_other: Gva(c.shadow_gs),
        entry: entry_point(c.msr_lstar),
    }
}

/// A vCPU that is down has no registers: Xen returns ENODATA or ENOENT, which is no error here.
pub(super) fn down_or(error: Error, vcpu: u32) -> Result<Vcpu, Error> {
    match error {
        Error::Call {
            errno: libc::ENODATA | libc::ENOENT,
            ..
        } => Ok(Vcpu {
            id: vcpu,
            ..Vcpu::default()
        }),
        other => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_without_the_control_bits_of_cr3() {
        // PCID, `CR3.LAM_U57` and `LAM_U48`, and NOFLUSH, which Linux sets in the value that it writes; bit 12 is
        // the lowest of the frame's number, and says which half of a pair it is.
        for bits in [0, 0xfff, 1 << 61, 1 << 62, 1 << 63, 7 << 61 | 0x80b] {
            let c = sys::hvm_hw_cpu {
                cr3: 0x1_2345_7000 | bits,
                ..Default::default()
            };
            assert_eq!(vcpu_hvm(3, &c).root, Frame(0x12_3457), "{bits:#x}");
        }
    }
}
