//! Replays what the fuzzer has found worth keeping: `make fuzz-arp-proxy` adds to it.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "checks assert by panicking, as tests do"
)]

use std::fs;
use std::path::Path;

#[path = "../fuzz/check.rs"]
mod check;

#[test]
fn the_kept_corpus_holds() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/wire");
    let mut replayed = 0;
    for entry in fs::read_dir(&directory).expect("the corpus is kept") {
        let path = entry.expect("readable").path();
        let input = fs::read(&path).expect("readable");
        println!("{}", path.display());
        check::check(&input);
        replayed += 1;
    }
    assert!(replayed > 0, "nothing in {}", directory.display());
}
