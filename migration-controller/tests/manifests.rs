//! What an operator applies is what the Rust types say.

use std::fs;
use std::path::Path;

#[test]
fn the_crd_is_the_one_of_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crd.yaml");
    let applied = fs::read_to_string(&path).unwrap();
    let generated = migration_controller::crd::yaml().unwrap();
    assert!(
        applied == generated,
        "manifests/crd.yaml is not what the types say; regenerate it:\n  \
         cargo run -p migration-controller -- crd > manifests/crd.yaml"
    );
}
