//! Releases of Debian, and which of their packages are unpacked.

/// A Debian release, and the packages that are wanted of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suite {
    /// Codename or suite, as in the archive's `dists/`.
    pub name: &'static str,
    /// Whether the security archive has this release.
    pub security: bool,
    /// Packages that are unpacked, with all that they depend on.
    pub packages: &'static [&'static str],
    /// Of these, only packages whose name begins with one of these words. If empty: all except [`SKIP`].
    pub only: &'static [&'static str],
}

/// Debian 12: dom0, and the guests that scenarios use unless they say otherwise.
pub const BOOKWORM: Suite = Suite {
    name: "bookworm",
    security: true,
    packages: &[
        "xen-utils-4.17",
        "xenstore-utils",
        "xen-hypervisor-4.17-amd64",
        "qemu-system-xen",
        "seabios",
        "busybox-static",
        "libgcc-s1",
        "libssl3",
        "libelf1",
        "linux-image-amd64",
        "linux-headers-amd64",
    ],
    only: &[],
};

/// What is installed in a dom0 that is a real Debian 12. `?…` are patterns of apt.
pub const INSTALLED: &[&str] = &[
    "?essential",
    "?priority(required)",
    "usr-is-merged",
    "systemd-sysv",
    "udev",
    "kmod",
    "dbus",
    "logrotate",
    "xen-utils-4.17",
    "xenstore-utils",
];

/// Packages of a release that is used for guest kernels only.
const KERNEL: &[&str] = &["linux-image-amd64", "linux-headers-amd64"];

/// The kernel (whose image and modules are separate packages in newer releases), headers, and what compiles
/// modules: kbuild's programs and the compiler, with the libraries that they load.
const KERNEL_ONLY: &[&str] = &[
    "linux-image-",
    "linux-binary-",
    "linux-modules-",
    "linux-headers-",
    "linux-kbuild-",
    "binutils-x86-64-linux-gnu",
    "cpp-",
    "gcc-",
    "libbinutils",
    "libbz2-",
    "libc6",
    "libctf",
    "libelf",
    "libgcc-",
    "libgmp",
    "libgprofng",
    "libisl",
    "libjansson",
    "liblzma",
    "libmpc",
    "libmpfr",
    "libsframe",
    "libssl",
    "libstdc++6",
    "libzstd",
    "zlib1g",
];

/// Debian 11, for its guest kernel.
pub const BULLSEYE: Suite = Suite {
    name: "bullseye",
    security: true,
    packages: KERNEL,
    only: KERNEL_ONLY,
};

/// Debian 13, for its guest kernel.
pub const TRIXIE: Suite = Suite {
    name: "trixie",
    ..BULLSEYE
};

/// The next release of Debian, for its guest kernel.
pub const TESTING: Suite = Suite {
    name: "testing",
    security: false,
    ..BULLSEYE
};

/// All releases, oldest kernel first.
pub const SUITES: [&Suite; 4] = [&BULLSEYE, &BOOKWORM, &TRIXIE, &TESTING];

/// Beginnings of the names of packages that are of no use in an initramfs.
pub const SKIP: &[&str] = &[
    "adduser",
    "binutils",
    "coreutils",
    "cpp-",
    "debconf",
    "dpkg",
    "gcc-12",
    "initramfs-tools",
    "ipxe-qemu",
    "iso-codes",
    "klibc-utils",
    "libasan",
    "libbinutils",
    "libcc1",
    "libgcc-12-dev",
    "libgomp",
    "libisl",
    "libitm",
    "liblsan",
    "libmpc3",
    "libmpfr",
    "libpython3",
    "libquadmath",
    "libtsan",
    "libubsan",
    "linux-base",
    "media-types",
    "passwd",
    "perl",
    "python3",
    "tar",
    "ucf",
    "udev",
];
