//! Payload files, read as `show` does.

use locus_payload::testelf::Spec;
use locus_payload::Payload;

/// `data` is a payload file.
pub fn run(data: &[u8]) {
    if let Ok(payload) = Payload::parse("fuzz.ko", data) {
        let _ = payload.needed_symbols();
        let _ = payload.placed().count();
        let _ = (payload.summary(), payload.concerns());
    }
}

/// Good livepatch modules: plain, with named variables, with their structures in separate sections, and of
/// kpatch-build.
pub fn seeds() -> Vec<Vec<u8>> {
    let objects = vec![
        (
            None,
            vec![("version_proc_show", 0), ("loadavg_proc_show", 2)],
        ),
        (Some("ext4"), vec![("ext4_read", 0)]),
    ];
    let named = Spec {
        objects: objects.clone(),
        named: true,
        ..Spec::default()
    };
    let apart = Spec {
        objects,
        homes: [".data", ".data.rel", ".data..ro_after_init"],
        ..Spec::default()
    };
    vec![
        Spec::default().bytes(),
        named.bytes(),
        apart.bytes(),
        Spec::kpatch().build(),
    ]
}
