//! Profiles: the machines that scenarios run on.

/// The properties of a machine. Scenarios of one profile share a boot.
#[derive(Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name on the command line, and the name of its folder of logs.
    pub name: &'static str,
    /// QEMU's `-cpu`. What QEMU can't emulate of a model is missing from it. None has SMAP: on QEMU 7.2 with it, Xen can't
    /// deliver an exception to dom0 (`create_bounce_frame` faults), and dom0 does not boot.
    pub cpu: &'static str,
    /// QEMU's `thread=`. Its SVM emulation loses guests with `multi`, so only PV may use that.
    pub thread: &'static str,
    /// Whether the device model and firmware for HVM guests are in the image.
    pub hvm: bool,
    /// Whether dom0 is a Debian 12 that is installed on a disk, with systemd and the init scripts of Xen's packages. Otherwise
    /// it has nothing but Xen's programs, in memory.
    pub debian: bool,
    /// Whether the machine's clock counts instructions, 2 ns each, instead of the host's time. While all of its
    /// CPUs are idle, the clock jumps to the next timer. Needs `thread=single`.
    pub counted: bool,
    /// Physical CPUs.
    pub cpus: u32,
    /// Memory of the machine, in MiB.
    pub memory: u32,
    /// Memory of dom0, in MiB.
    pub dom0_memory: u32,
    /// vCPUs of dom0.
    pub dom0_vcpus: u32,
    /// Additional arguments of the hypervisor.
    pub xen_args: &'static str,
    /// Additional arguments of dom0's kernel.
    pub dom0_args: &'static str,
}

/// qemu64, with the features that Xen needs for hardware assisted paging on emulated SVM.
const QEMU64: &str = "qemu64,+svm,+npt,+nx,+lm,+pdpe1gb,+fsgsbase,+smep,+rdrand,+invtsc";

/// PV guests, on two physical CPUs that run in parallel.
pub const PV: Profile = Profile {
    name: "pv",
    cpu: QEMU64,
    thread: "multi",
    hvm: false,
    debian: false,
    counted: false,
    cpus: 2,
    memory: 3072,
    dom0_memory: 1536,
    dom0_vcpus: 1,
    xen_args: "",
    dom0_args: "",
};

/// PV guests, on four physical CPUs, and a dom0 with two vCPUs: a run, its guardian, the daemon and `xl` run truly at the
/// same time.
pub const PV4: Profile = Profile {
    name: "pv4",
    cpus: 4,
    dom0_vcpus: 2,
    ..PV
};

/// PV guests, on one physical CPU: a host with two processors can run another machine beside it.
pub const PV1: Profile = Profile {
    name: "pv1",
    thread: "single",
    cpus: 1,
    ..PV
};

/// PV guests, and a dom0 that is a real Debian 12.
pub const DEBIAN: Profile = Profile {
    name: "debian",
    debian: true,
    // What systemd shows takes longer on an emulated console than what it does.
    dom0_args: "systemd.show_status=no",
    ..PV1
};

/// PV guests, and memory for twenty of them.
pub const CROWD: Profile = Profile {
    name: "crowd",
    memory: 4096,
    ..PV
};

/// PVH guests (and PV ones), on one physical CPU. With two, QEMU's SVM emulation loses the guest's GS base
/// even with `thread=single`: 9 of 15 guests crashed when their first process began; with one CPU none of
/// 16 did (those 16 without fsgsbase).
pub const PVH: Profile = Profile {
    name: "pvh",
    thread: "single",
    cpus: 1,
    ..PV
};

/// HVM guests (and PVH and PV ones).
pub const HVM: Profile = Profile {
    name: "hvm",
    hvm: true,
    memory: 3584,
    ..PVH
};

/// PV guests, on an Intel processor of before 2018, with all faults that were found since. Xen isolates page tables of
/// PV guests there.
pub const HASWELL: Profile = Profile {
    name: "haswell",
    cpu: "Haswell-noTSX",
    ..PV1
};

/// PV guests, on an Intel processor of 2019, whose indirect branches in the lower half of a cache line can be misled
/// (ITS).
pub const CASCADELAKE: Profile = Profile {
    name: "cascadelake",
    cpu: "Cascadelake-Server-v1,-smap",
    ..PV1
};

/// PV guests, on an old Intel processor. It is given random numbers: without them a kernel changes a jump label when it has
/// gathered enough, minutes after its boot.
pub const NEHALEM: Profile = Profile {
    name: "nehalem",
    cpu: "Nehalem,+rdrand",
    ..PV1
};

/// PVH guests, on an AMD processor of family 17h, whose returns can be misled (Retbleed, SRSO). It has no `rdtscp`: for
/// that QEMU gives Xen the exit of `rdtsc`, Xen finds another instruction there, and ends the guest.
pub const EPYC: Profile = Profile {
    name: "epyc",
    cpu: "EPYC-v1,+svm,+npt,-smap,-rdtscp",
    ..PVH
};

/// PVH guests, on an AMD processor of family 19h. It has no `rdtscp`, as [`EPYC`].
pub const MILAN: Profile = Profile {
    name: "milan",
    cpu: "EPYC-Milan-v1,+svm,+npt,-smap,-rdtscp",
    ..PVH
};

/// PV guests, with a clock that counts instructions. QEMU then runs one CPU after the other, so there is only one.
pub const PV_COUNTED: Profile = Profile {
    name: "pv-counted",
    counted: true,
    ..PV1
};

/// PVH guests, with a clock that counts instructions.
pub const PVH_COUNTED: Profile = Profile {
    name: "pvh-counted",
    counted: true,
    ..PVH
};

/// All profiles, in the order in which they run.
pub const PROFILES: &[&Profile] = &[
    &PV,
    &PV4,
    &CROWD,
    &PV1,
    &DEBIAN,
    &PVH,
    &HVM,
    &NEHALEM,
    &HASWELL,
    &CASCADELAKE,
    &EPYC,
    &MILAN,
    &PV_COUNTED,
];
