//! The model finds by itself what happens once one kind of fault is no longer kept away.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::convergence::{
    event, has_its_network, is_taken_over, keeps_the_choice, leftover, start,
};
use super::{Event, Start};
use crate::mend::Mend;

/// How many cases it may take. Each of the faults is found within a few hundred.
const CASES: u32 = 20_000;

/// Whether the model finds what `mend` keeps away, always in the same cases.
fn finds<S: Strategy>(
    mend: Mend,
    cases: &S,
    property: impl Fn(S::Value) -> Result<(), TestCaseError>,
) -> bool {
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        // That it is found is enough.
        max_shrink_iters: 0,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    mend.omitted(|| runner.run(cases, property).is_err())
}

fn cases(start: impl Strategy<Value = Start>) -> impl Strategy<Value = (Start, Vec<Event>)> {
    (start, vec(event(), 0..80))
}

fn is_found_on_the_way(mend: Mend) {
    assert!(finds(mend, &cases(start()), |(start, events)| {
        has_its_network(&start, &events)
    }));
}

/// D1: no announcement reaches OVN, and KubeVirt's word is all there is.
#[test]
fn a_port_that_is_shut_though_kubevirt_says_that_its_guest_runs() {
    let start = start().prop_map(|start| Start {
        agents: false,
        silent: true,
        ..start
    });
    assert!(finds(
        Mend::ShutThoughKubevirtSays,
        &cases(start),
        |(start, events)| { has_its_network(&start, &events) }
    ));
}

/// D13: an ovn-controller that comes back shuts what was opened early.
#[test]
fn a_port_that_is_shut_though_an_agent_hears_its_guest() {
    is_found_on_the_way(Mend::ShutThoughHeard);
}

/// D4: the VM's news is from before its last migration.
#[test]
fn a_port_that_is_bound_elsewhere() {
    is_found_on_the_way(Mend::BoundElsewhere);
}

/// B1: a migration fails, or is deleted, while another one runs.
#[test]
fn a_migration_that_moved_nothing() {
    is_found_on_the_way(Mend::MovedNothing);
}

/// B2: a migration waits while another one moves the guest.
#[test]
fn a_source_that_a_record_remembers() {
    is_found_on_the_way(Mend::RecordedSource);
}

/// B4: a list that somebody left behind.
#[test]
fn a_list_that_was_left_over() {
    assert!(finds(
        Mend::LeftoverList,
        &cases(leftover()),
        |(start, events)| { is_taken_over(&start, &events) }
    ));
}

/// D7: the VM is deleted in flight, and its owner asks for another place.
#[test]
fn a_choice_that_is_newer_than_the_handover() {
    let cases = (start(), vec(event(), 0..60), vec(event(), 0..20));
    assert!(finds(Mend::NewerChoice, &cases, |(start, events, more)| {
        keeps_the_choice(&start, &events, &more)
    }));
}
