//! VMCOREINFO, the text that a kernel writes for crash dumps.

use locus_kernel::vmcoreinfo::VmcoreInfo;

use super::guest;
use super::stage::Stage;

thread_local! {
    static STAGE: Stage = guest::stage();
}

/// `data` is the text.
pub fn run(data: &[u8]) {
    let Ok(info) = VmcoreInfo::parse(data.to_vec()) else {
        return;
    };
    assert_eq!(info.text().as_bytes(), data);
    for (key, value) in info.iter() {
        assert_eq!(info.get(key), Some(value));
        if let Some((_, name)) = key.split_once('(') {
            let name = name.trim_end_matches(')');
            let _ = (info.symbol(name), info.offset(name), info.size(name));
            let _ = (info.length(name), info.number(name));
        }
    }
    let kernel = STAGE.with(|stage| stage.kernel(&guest::variables()));
    let _ = info.check(&kernel.unwrap());
}

/// A text with a line of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let text = "OSRELEASE=6.1.0-test\nBUILD-ID=00ff\nPAGESIZE=4096\nKERNELOFFSET=0\n\
                SYMBOL(_stext)=ffffffff81000000\nOFFSET(page.flags)=0\nSIZE(page)=64\n\
                LENGTH(mem_section)=2048\nNUMBER(PG_lru)=-129\nNUMBER(pgtable_l5_enabled)=0\n";
    vec![text.into()]
}
