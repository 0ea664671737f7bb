//! What the agents are told of a VM, and what its record tells of the gate.

use handover::{Answer, Network, SignalKind, SignalSource, Verdict};

use super::super::news::News;
use super::super::{Case, IN_TRANSIT, agents, summary};
use super::*;
use crate::api::SignalSeen;

/// The VM of the first migration, looked at, with its ports as they are.
struct Looked {
    objects: VmObjects,
    rows: Vec<PortRow>,
    cases: Vec<Case>,
}

fn armed(mut row: PortRow, prepared: bool) -> PortRow {
    let mut mark = mark("m-1", 7);
    mark.barrier = prepared.then_some(1);
    for (key, value) in mark.to_external_ids() {
        row.external_ids.insert(key.to_owned(), value);
    }
    row.options
        .insert("requested-chassis".into(), "c1,c2".into());
    row.options
        .insert("activation-strategy".into(), "rarp".into());
    row.binding.chassis = Some("c1".into());
    if prepared {
        row.binding.additional = vec!["c2".into()];
    }
    row
}

fn addressed(name: &str, addresses: &[&str]) -> PortRow {
    PortRow {
        name: PortName::new(name),
        addresses: addresses.iter().map(ToString::to_string).collect(),
        ..port(None)
    }
}

fn objects(phase: &str) -> VmObjects {
    VmObjects {
        vmi: Some(vmi(&json!({ "nodeName": "n1" }))),
        migrations: vec![migration("m-1", SECOND, phase)],
        handovers: vec![handover("m-1", 7, Phase::Preparing)],
        ..VmObjects::default()
    }
}

fn looked(objects: VmObjects, rows: Vec<PortRow>, signals: &[SignalSeen]) -> Looked {
    let mut records = load(&objects, &rows);
    let mut cases = Vec::new();
    for record in records.values_mut() {
        record.status.signals.extend_from_slice(signals);
        let seen = look(record, &objects, &rows);
        let decision = decide(&seen.observed);
        record.reflect(&decision, &seen, Moment::now());
        cases.push(Case {
            record: record.clone(),
            seen,
            decision,
        });
    }
    Looked {
        objects,
        rows,
        cases,
    }
}

impl Looked {
    fn standing(&self) -> Option<crate::agents::Standing> {
        agents::standing(&vm(), &self.cases, &self.rows)
    }

    fn network(&self) -> Network {
        let view = agents::view(&self.objects, &self.cases);
        assert_eq!(view.uid.as_deref(), Some("v-1"));
        view.migrations[0].network.clone()
    }
}

const ADDRESSES: [&str; 2] = ["0A:00:00:00:00:01 10.0.0.1 fd00::1", "unknown"];

#[test]
fn both_ends_know_the_ports_by_their_macs_and_addresses() {
    let row = armed(addressed("w0.tenant", &ADDRESSES), true);
    let standing = looked(objects("Running"), vec![row], &[])
        .standing()
        .unwrap();
    assert_eq!((standing.migration.as_str(), standing.epoch), ("m-1", 7));
    assert_eq!(
        (standing.source.node.as_str(), standing.target.node.as_str()),
        ("n1", "n2")
    );
    let [port] = &standing.source.ports[..] else {
        panic!("{:?}", standing.source);
    };
    assert_eq!(
        (port.name.as_str(), port.mac.as_str()),
        ("w0.tenant", "0a:00:00:00:00:01")
    );
    assert_eq!(port.addresses, ["10.0.0.1", "fd00::1"]);
    assert_eq!(standing.source.ports, standing.target.ports);
    for nothing in [
        &["unknown"][..],
        &["dynamic"],
        &["router"],
        &["0a:00:00:00:00"],
        &[],
    ] {
        let row = armed(addressed("w0.tenant", nothing), true);
        let standing = looked(objects("Running"), vec![row], &[])
            .standing()
            .unwrap();
        assert!(standing.target.ports.is_empty(), "{nothing:?}");
    }
}

#[test]
fn of_a_pair_each_end_knows_its_own() {
    let source = armed(addressed("pod-a", &ADDRESSES), false);
    let mut target = armed(addressed("pod-b", &ADDRESSES), false);
    target
        .external_ids
        .insert("segue.io/source-port".into(), "pod-a".into());
    let mut looked = looked(objects("Running"), vec![source.clone()], &[]);
    looked.rows = vec![source, target];
    let standing = looked.standing().unwrap();
    let names = |ports: &[node_hooks_api::agent::Port]| -> Vec<_> {
        ports.iter().map(|port| port.name.clone()).collect()
    };
    assert_eq!(names(&standing.source.ports), ["pod-a"]);
    assert_eq!(names(&standing.target.ports), ["pod-b"]);
}

#[test]
fn it_is_prepared_once_the_barrier_is_met_and_stays_so_while_the_guest_moves() {
    let at = |kind, source| SignalSeen {
        kind,
        source,
        at: moment(SECOND),
        node: None,
    };
    let paused = at(SignalKind::Paused, SignalSource::Libvirt);
    let back = at(SignalKind::ResumedOnSource, SignalSource::Libvirt);
    let row = |prepared| vec![armed(addressed("w0.tenant", &ADDRESSES), prepared)];
    let standing = |rows, signals: &[SignalSeen]| {
        let looked = looked(objects("Running"), rows, signals);
        looked.standing().map(|standing| standing.prepared)
    };
    assert_eq!(standing(row(false), &[]), Some(false));
    assert_eq!(standing(row(true), &[]), Some(true));
    assert_eq!(
        standing(row(true), std::slice::from_ref(&paused)),
        Some(true)
    );
    assert_eq!(standing(row(true), &[paused, back]), Some(false));
    let mut unarmed = addressed("w0.tenant", &ADDRESSES);
    unarmed.binding.chassis = Some("c1".into());
    assert_eq!(
        standing(vec![unarmed], &[]),
        Some(false),
        "T1 is not written"
    );
}

#[test]
fn what_is_pending_or_over_is_not_armed() {
    let mut objects = objects("Running");
    assert_eq!(
        looked(objects.clone(), Vec::new(), &[]).standing(),
        None,
        "no port"
    );
    objects.migrations = vec![migration("m-1", SECOND, "Failed")];
    let row = addressed("w0.tenant", &ADDRESSES);
    let over = looked(objects, vec![row], &[]);
    assert_eq!(over.cases[0].record.status.phase, Phase::RolledBack);
    assert_eq!(over.standing(), None);
    let stays = agents::guest_on(&over.cases, &over.objects);
    assert_eq!(stays.as_deref(), Some("n1"));
}

#[test]
fn a_guest_in_transit_is_not_kept_waiting_for_its_record() {
    let paused = SignalSeen {
        kind: SignalKind::Paused,
        source: SignalSource::Libvirt,
        at: moment(SECOND),
        node: None,
    };
    let rows = || vec![armed(addressed("w0.tenant", &ADDRESSES), true)];
    let mut looked = looked(objects("Running"), rows(), &[paused]);
    assert_eq!(looked.cases[0].record.status.phase, Phase::Switching);
    let until = summary(&looked.cases, IN_TRANSIT).in_transit.unwrap();
    assert!(until > Moment::now());
    // But not for ever: it may be a long pause.
    looked.cases[0].record.status.phase_since = Some(moment(SECOND));
    assert_eq!(summary(&looked.cases, IN_TRANSIT).in_transit, None);
    let ready = super::agents::looked(objects("Running"), rows(), &[]);
    assert_eq!(summary(&ready.cases, IN_TRANSIT).in_transit, None);
}

// === The gate ===

#[test]
fn the_gate_is_answered_by_the_phase() {
    let row = |prepared| vec![armed(addressed("w0.tenant", &ADDRESSES), prepared)];
    let waiting = looked(objects("Running"), row(false), &[]).network();
    let Network::Preparing { waiting } = waiting else {
        panic!("{waiting:?}");
    };
    assert!(waiting.contains("w0.tenant"), "{waiting}");
    let ready = looked(objects("Running"), row(true), &[]);
    assert_eq!(ready.network(), Network::Prepared);
    let none = looked(objects("Running"), Vec::new(), &[]).network();
    assert!(matches!(none, Network::NotWanted { .. }), "{none:?}");
    let back = SignalSeen {
        kind: SignalKind::ResumedOnSource,
        source: SignalSource::Libvirt,
        at: moment(SECOND),
        node: None,
    };
    let failed = looked(objects("Running"), row(true), &[back]).network();
    let Network::Failed { why } = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(why, "the source resumed the guest");
}

#[test]
fn a_migration_to_another_cluster_wants_no_network_here() {
    let mut objects = objects("Running");
    let mut leaving = VirtualMachineInstanceMigration::clone(&objects.migrations[0]);
    leaving.spec.send_to = Some(json!({}));
    objects.migrations = vec![Arc::new(leaving)];
    let row = addressed("w0.tenant", &ADDRESSES);
    let network = looked(objects, vec![row], &[]).network();
    assert!(matches!(network, Network::NotWanted { .. }), "{network:?}");
}

#[test]
fn a_handover_that_is_over_before_its_migration_answers_for_itself() {
    let mut objects = objects("Running");
    objects.handovers = vec![handover("m-1", 7, Phase::RolledBack)];
    let view = agents::view(&objects, &[]);
    let network = &view.migrations[0].network;
    assert!(matches!(network, Network::Failed { .. }), "{network:?}");
    assert!(!view.migrations[0].over);
}

#[test]
fn a_migration_that_was_let_go_unprepared_or_held_back_is_told_of() {
    for (verdict, reason) in [
        (Verdict::GoUnprepared, "MigrationNotHeldBack"),
        (Verdict::Fail, "MigrationHeldBack"),
    ] {
        let news = News::gate(&Answer {
            verdict,
            reason: "no claim".into(),
        });
        assert_eq!(news.reason, reason);
        assert!(news.warning && news.note.contains("no claim"), "{news:?}");
    }
}
