//! What an operator applies is what the Rust types say.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clap::CommandFactory as _;
use migration_controller::Cli;

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

#[test]
fn what_an_operator_can_set_is_what_the_controller_takes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/ovn-endpoints.env");
    let text = fs::read_to_string(&path).unwrap();
    let names = text.lines().filter_map(|line| line.split_once('='));
    // One that is commented out is there to be set.
    let names: BTreeSet<_> = names
        .map(|(name, _)| name.trim_start_matches('#'))
        .filter(|name| name.starts_with("SEGUE_"))
        .collect();
    let command = Cli::command();
    let taken = command
        .get_arguments()
        .filter_map(|argument| argument.get_env());
    let taken: BTreeSet<_> = taken.filter_map(|name| name.to_str()).collect();
    assert!(names.is_subset(&taken), "{names:?} are not among {taken:?}");
    assert!(names.contains("SEGUE_CLUSTER_ROUTER"), "{names:?}");
}
