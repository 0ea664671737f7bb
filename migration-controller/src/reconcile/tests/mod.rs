mod agents;
mod trouble;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use handover::{
    Barrier, Binding, Chassis, Deadlines, Epoch, Mark, MigrationUid, Original, Phase, PortName,
    Route, RouteKey, Side, Step, VmName, Waiting, Write, decide,
};
use serde_json::{Value, json};

use super::record::Record;
use super::rest::{Rest, rest};
use super::{Looked, plan};
use crate::agents::Learned;
use crate::api::{
    Condition, ConditionStatus, ConditionType, Handover, Moment, RoutingMode, TimelineStep,
};
use crate::cluster::VmObjects;
use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use crate::observe::{Ending, Incompatible, Inputs, Observation, Patience, observe};
use crate::ovn::{Places, PortRow};

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn moment(text: &str) -> Moment {
    Moment::from_jiff(text.parse().unwrap())
}

fn vm() -> VmName {
    VmName::new("tenant", "w0")
}

fn vmi(status: &Value) -> Arc<VirtualMachineInstance> {
    Arc::new(from(json!({ "spec": {}, "status": status,
        "metadata": { "name": "w0", "namespace": "tenant", "uid": "v-1" } })))
}

fn migration(uid: &str, created: &str, phase: &str) -> Arc<VirtualMachineInstanceMigration> {
    Arc::new(from(
        json!({ "spec": { "vmiName": "w0" }, "status": { "phase": phase },
        "metadata": { "name": uid, "namespace": "tenant", "uid": uid,
            "creationTimestamp": created } }),
    ))
}

fn handover(uid: &str, epoch: i64, phase: Phase) -> Arc<Handover> {
    Arc::new(from(json!({
        "metadata": { "name": uid, "namespace": "tenant" },
        "spec": { "vm": { "name": "w0", "uid": "v-1" }, "migration": { "name": uid, "uid": uid },
            "epoch": epoch, "source": { "node": "n1", "chassis": "c1" },
            "target": { "node": "n2", "chassis": "c2" } },
        "status": { "phase": phase, "phaseSince": "2026-09-01T10:00:00Z" },
    })))
}

fn mark(uid: &str, epoch: u64) -> Mark {
    Mark {
        migration: MigrationUid::new(uid),
        epoch: Epoch(epoch),
        source: "c1".into(),
        target: "c2".into(),
        original: Original::default(),
        barrier: None,
        source_released: false,
    }
}

fn port(mark: Option<&Mark>) -> PortRow {
    let ids = mark.map(Mark::to_external_ids).unwrap_or_default();
    PortRow {
        uuid: uuid::Uuid::nil(),
        name: PortName::new("w0.tenant"),
        addresses: Vec::new(),
        options: BTreeMap::new(),
        external_ids: ids
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        binding: Binding::default(),
        activated: BTreeSet::new(),
    }
}

fn chassis_of(node: &str) -> Option<Chassis> {
    let number = node.strip_prefix('n')?;
    Some(Chassis::new(format!("c{number}"), node))
}

fn load(objects: &VmObjects, ports: &[PortRow]) -> BTreeMap<String, Record> {
    let mut records = BTreeMap::new();
    plan::load(
        &vm(),
        objects,
        ports,
        &BTreeMap::new(),
        &chassis_of,
        &mut records,
    );
    records
}

fn look(record: &mut Record, objects: &VmObjects, ports: &[PortRow]) -> Observation {
    let migration = record.migration.clone();
    let inputs = Inputs {
        now: moment("2026-09-01T10:10:00Z"),
        objects,
        migration: migration.as_deref(),
        former: &[],
        ports,
        routes: (&[], &BTreeSet::new()),
        flip: handover::FlipPolicy::default(),
        barrier: Barrier::default(),
        chassis_of: &chassis_of,
        patience: Patience {
            deadlines: Deadlines::default(),
            pod_gone_grace: std::time::Duration::from_mins(1),
        },
        learned: &Learned::default(),
    };
    observe(&inputs, &mut record.spec, &mut record.status)
}

const SECOND: &str = "2026-09-01T10:00:00Z";

fn second() -> i64 {
    SECOND.parse::<jiff::Timestamp>().unwrap().as_second()
}

// === Which handovers there are ===

#[test]
fn a_new_migrations_epoch_is_above_all_that_are_known() {
    let objects = VmObjects {
        migrations: vec![migration("m-1", SECOND, "Pending")],
        ..VmObjects::default()
    };
    assert_eq!(load(&objects, &[])["m-1"].spec.epoch, second());

    let later = second() + 100;
    let objects = VmObjects {
        handovers: vec![handover("m-0", later, Phase::Succeeded)],
        ..objects
    };
    assert_eq!(load(&objects, &[])["m-1"].spec.epoch, later + 1);

    let later = u64::try_from(later).unwrap() + 50;
    let marked = port(Some(&mark("m-0", later)));
    assert_eq!(
        load(&objects, &[marked])["m-1"].spec.epoch(),
        Epoch(later + 1)
    );
}

#[test]
fn migrations_of_one_second_have_epochs_in_their_order() {
    let objects = VmObjects {
        migrations: vec![
            migration("m-1", SECOND, "Pending"),
            migration("m-2", SECOND, "Pending"),
        ],
        ..VmObjects::default()
    };
    let records = load(&objects, &[]);
    assert!(records["m-1"].spec.epoch < records["m-2"].spec.epoch);
}

#[test]
fn a_deleted_handover_is_made_again_with_the_epoch_on_its_ports() {
    let objects = VmObjects {
        migrations: vec![migration("m-1", SECOND, "Running")],
        ..VmObjects::default()
    };
    let records = load(&objects, &[port(Some(&mark("m-1", 42)))]);
    assert_eq!(records["m-1"].spec.epoch, 42);
    assert!(records["m-1"].is_spec_stale());
}

#[test]
fn history_gets_no_record() {
    let told = json!({ "nodeName": "n2", "migrationState": { "migrationUid": "m-2",
        "sourceNode": "n1", "targetNode": "n2", "completed": true } });
    let objects = VmObjects {
        vmi: Some(vmi(&told)),
        migrations: vec![
            migration("m-1", SECOND, "Succeeded"),
            migration("m-2", "2026-09-01T11:00:00Z", "Succeeded"),
        ],
        ..VmObjects::default()
    };
    let worth = |row: PortRow| {
        let mut records = load(&objects, std::slice::from_ref(&row));
        assert!(!records.contains_key("m-1"));
        let record = records.get_mut("m-2").unwrap();
        let seen = look(record, &objects, &[row]);
        plan::is_worth_it(record, &decide(&seen.observed))
    };
    let mut fine = port(None);
    fine.binding.chassis = Some("c2".into());
    assert!(!worth(fine.clone()));
    // The controller was away for all of it, and the port is pinned to where the guest was.
    fine.options.insert("requested-chassis".into(), "c1".into());
    assert!(worth(fine));
}

#[test]
fn a_mark_without_a_migration_or_a_handover_is_an_orphan() {
    let objects = VmObjects {
        vmi: Some(vmi(&json!({ "nodeName": "n2" }))),
        ..VmObjects::default()
    };
    let row = port(Some(&mark("m-9", 42)));
    let mut records = load(&objects, std::slice::from_ref(&row));
    let record = records.get_mut("m-9").unwrap();
    assert!(record.orphan);
    let seen = look(record, &objects, &[row]);
    assert_eq!(seen.ending, Ending::On(Side::Target));
    let write = decide(&seen.observed).write.unwrap();
    assert_eq!(
        write.ports[0].config.requested_chassis.as_deref(),
        Some("c2")
    );
}

#[test]
fn an_orphans_guest_may_be_on_neither_node_or_gone() {
    let row = port(Some(&mark("m-9", 42)));
    let ending = |vmi: Option<Arc<VirtualMachineInstance>>| {
        let objects = VmObjects {
            vmi,
            ..VmObjects::default()
        };
        let mut records = load(&objects, std::slice::from_ref(&row));
        look(
            records.get_mut("m-9").unwrap(),
            &objects,
            std::slice::from_ref(&row),
        )
        .ending
    };
    let elsewhere = vmi(&json!({ "nodeName": "n3" }));
    let node = "n3".to_owned();
    let followed = true;
    assert_eq!(
        ending(Some(elsewhere)),
        Ending::Elsewhere { node, followed }
    );
    assert_eq!(ending(None), Ending::Gone);
}

#[test]
fn what_was_learned_outlives_a_failed_save() {
    let objects = VmObjects {
        migrations: vec![migration("m-1", SECOND, "Running")],
        handovers: vec![handover("m-1", 7, Phase::Pending)],
        ..VmObjects::default()
    };
    let mut learned = Record::of(&objects.handovers[0], None);
    let at = moment("2026-09-01T10:00:05Z");
    learned.status.take_step(TimelineStep::Armed, at);
    let unsaved = BTreeMap::from([("m-1".to_owned(), learned)]);
    let mut records = BTreeMap::new();
    plan::load(&vm(), &objects, &[], &unsaved, &chassis_of, &mut records);
    let record = &records["m-1"];
    assert_eq!(record.status.step(TimelineStep::Armed), Some(at));
    assert!(record.migration.is_some() && record.is_status_stale() && !record.is_spec_stale());
}

#[test]
fn a_finished_handover_reopens_only_for_what_it_must_answer_for() {
    // (its phase, the mark on the port, the VM's node, whether it is the newest, whether it reopens)
    let cases = [
        (Phase::Succeeded, None, "n2", true, false),
        (Phase::Succeeded, Some(mark("m-1", 7)), "n2", false, true),
        (Phase::Succeeded, Some(mark("m-0", 6)), "n2", true, true),
        (Phase::Succeeded, Some(mark("m-0", 6)), "n2", false, false),
        (Phase::Succeeded, Some(mark("m-2", 8)), "n2", true, false),
        (Phase::RolledBack, None, "n1", true, false),
        (Phase::RolledBack, None, "n2", true, true),
        (Phase::RolledBack, None, "n2", false, false),
    ];
    for (phase, mark, node, newest, reopens) in cases {
        let failed = phase == Phase::RolledBack;
        let told = json!({ "migrationUid": "m-1", "sourceNode": "n1", "targetNode": "n2" });
        let status = json!({ "nodeName": node, "migrationState": told });
        let objects = VmObjects {
            vmi: Some(vmi(&status)),
            migrations: vec![migration(
                "m-1",
                SECOND,
                if failed { "Failed" } else { "Succeeded" },
            )],
            handovers: vec![handover("m-1", 7, phase)],
            ..VmObjects::default()
        };
        let row = port(mark.as_ref());
        let mut records = load(&objects, std::slice::from_ref(&row));
        let mut record = records.remove("m-1").unwrap();
        let seen = look(&mut record, &objects, &[row]);
        let looked = Looked {
            before: phase,
            record,
            seen,
        };
        let found = plan::reopens(&looked, newest);
        assert_eq!(
            found, reopens,
            "{phase}, {mark:?}, on {node}, newest: {newest}"
        );
    }
}

/// Two migrations of one VM, observed: the older one in this phase, the newer one on its way.
fn two(older: &str, newer: &str, row: &PortRow) -> [Observation; 2] {
    let objects = VmObjects {
        vmi: Some(vmi(&json!({ "nodeName": "n1" }))),
        migrations: vec![
            migration("m-1", SECOND, older),
            migration("m-2", "2026-09-01T10:00:09Z", newer),
        ],
        handovers: vec![
            handover("m-1", 7, Phase::Preparing),
            handover("m-2", 8, Phase::Pending),
        ],
        ..VmObjects::default()
    };
    let mut records = load(&objects, std::slice::from_ref(row));
    let mut looked: Vec<_> = ["m-2", "m-1"]
        .map(|uid| {
            let mut record = records.remove(uid).unwrap();
            let before = record.status.phase;
            let seen = look(&mut record, &objects, std::slice::from_ref(row));
            Looked {
                before,
                record,
                seen,
            }
        })
        .into();
    plan::order(&mut looked);
    let [newer, older] = looked.try_into().ok().unwrap();
    [older.seen, newer.seen]
}

#[test]
fn a_migration_that_fails_while_another_runs_writes_nothing_and_takes_nothing_over() {
    let mut row = port(Some(&mark("m-1", 7)));
    row.options
        .insert("requested-chassis".into(), "c1,c2".into());
    row.binding.chassis = Some("c1".into());
    row.binding.additional = vec!["c2".into()];
    let [running, failed] = two("Running", "Failed", &row);
    assert!(failed.observed.earlier.under_way);
    let decision = decide(&failed.observed);
    assert_eq!((decision.write, decision.phase), (None, Phase::RolledBack));
    assert!(!decide(&running.observed).superseded);
    // One that waits for it waits on.
    let [running, waiting] = two("Running", "Pending", &row);
    assert_eq!(decide(&waiting.observed).write, None);
    assert!(!decide(&running.observed).superseded);
}

#[test]
fn a_migration_is_not_from_where_the_one_before_has_taken_the_guest_away() {
    let mut row = port(None);
    row.binding.chassis = Some("c1".into());
    // KubeVirt's word of the instance is from before.
    let [_, mut next] = two("Succeeded", "Running", &row);
    let left_on = next.observed.earlier.left_guest_on.clone();
    assert_eq!(left_on, Some(Chassis::new("c2", "n2")));
    next.observed.target = Some(Chassis::new("c3", "n3"));
    let decision = decide(&next.observed);
    assert_eq!(decision.waiting, Some(Waiting::EarlierMigration));
}

#[test]
fn only_a_migration_that_succeeded_left_its_source() {
    let left = |phase: Phase| {
        let objects = VmObjects {
            handovers: vec![handover("m-0", 3, phase)],
            ..VmObjects::default()
        };
        let record = Record::of(&handover("m-1", 7, Phase::Pending), None);
        plan::former(&record, &objects, &chassis_of)
    };
    assert_eq!(left(Phase::Succeeded), [Chassis::new("c1", "")]);
    assert!(left(Phase::RolledBack).is_empty());
}

// === The record ===

#[test]
fn a_handover_keeps_its_owner_when_that_is_gone() {
    let stored = handover("m-1", 7, Phase::Ready);
    let fresh = Record::of(&stored, Some(&migration("m-1", SECOND, "Running")));
    let owners = fresh.owners();
    assert_eq!(owners[0].uid, "m-1");
    assert_eq!(owners[0].block_owner_deletion, None);
    let mut stored = Handover::clone(&stored);
    stored.metadata.owner_references = Some(owners.clone());
    assert_eq!(Record::of(&Arc::new(stored), None).owners(), owners);
}

fn news(record: &Record) -> Vec<&'static str> {
    record.news.iter().map(|news| news.reason).collect()
}

#[test]
fn a_phase_is_news_once() {
    let objects = VmObjects {
        vmi: Some(vmi(&json!({ "nodeName": "n1" }))),
        migrations: vec![migration("m-1", SECOND, "Failed")],
        handovers: vec![handover("m-1", 7, Phase::Ready)],
        ..VmObjects::default()
    };
    let mut records = load(&objects, &[port(None)]);
    let record = records.get_mut("m-1").unwrap();
    let now = moment("2026-09-01T10:10:00Z");
    for _ in 0..2 {
        let seen = look(record, &objects, &[port(None)]);
        let decision = decide(&seen.observed);
        record.reflect(&decision, &seen, now);
    }
    assert_eq!(news(record), ["NetworkUnchanged"]);
    let [news] = &record.news[..] else {
        unreachable!()
    };
    assert_eq!(news.ended, Some((Phase::Ready, 600.0)));
    assert_eq!(record.status.phase, Phase::RolledBack);
    assert_eq!(record.status.step(TimelineStep::RolledBack), Some(now));
    let complete = Condition::find(&record.status.conditions, ConditionType::Complete).unwrap();
    assert_eq!(complete.status, ConditionStatus::True);
    assert!(record.status.failure_reason.is_some());
}

#[test]
fn trouble_is_news_once_and_passes() {
    let mut record = Record::of(&handover("m-1", 7, Phase::Ready), None);
    let now = moment(SECOND);
    for _ in 0..2 {
        record.degrade(Some(("DamagedMark", "port p".into())), now);
    }
    assert_eq!(news(&record), ["NetworkNeedsAttention"]);
    assert!(record.news[0].warning);
    record.degrade(None, now);
    let degraded = Condition::find(&record.status.conditions, ConditionType::Degraded).unwrap();
    assert_eq!(degraded.status, ConditionStatus::False);
    record.degrade(Some(("DamagedMark", "port p".into())), now);
    assert_eq!(record.news.len(), 2);
}

#[test]
fn what_the_network_cannot_save_is_said_once() {
    let found = |certain| {
        Some(Incompatible {
            certain,
            reason: "Masquerade",
            message: "interface a".into(),
        })
    };
    let compatible = |found: &dyn Fn() -> Option<Incompatible>| {
        let mut record = Record::of(&handover("m-1", 7, Phase::Pending), None);
        for _ in 0..2 {
            record.preflight(&vmi(&json!({})), found(), moment(SECOND));
        }
        let said = Condition::find(&record.status.conditions, ConditionType::Compatible);
        let told = news(&record).concat();
        (said.unwrap().status, told)
    };
    let broken = (ConditionStatus::False, "ConnectionsWillBreak".to_owned());
    assert_eq!(compatible(&|| found(true)), broken);
    // Nothing is known to break: it is for whoever looks.
    let unknown = (ConditionStatus::Unknown, String::new());
    assert_eq!(compatible(&|| found(false)), unknown);
    assert_eq!(compatible(&|| None), (ConditionStatus::True, String::new()));
}

// === Guests at rest ===

/// A port of the VM on a routed switch, bound where it says.
fn bound(name: &str, chassis: Option<&str>, additional: &[&str]) -> PortRow {
    PortRow {
        name: PortName::new(name),
        binding: Binding {
            chassis: chassis.map(Into::into),
            additional: additional.iter().map(|&name| name.into()).collect(),
        },
        ..port(None)
    }
}

fn led(key: &str, to: &[&str]) -> Route {
    Route {
        key: RouteKey::new(key),
        leads_to: to.iter().map(|&name| name.into()).collect(),
    }
}

fn at_rest(status: &Value, ports: &[PortRow], routes: &[Route], mode: RoutingMode) -> Rest {
    let objects = VmObjects {
        vmi: Some(vmi(status)),
        ..VmObjects::default()
    };
    let places = Places {
        routes: routes.to_vec(),
        gateways: ["c1".to_owned(), "c2".to_owned()].into(),
        ..Places::default()
    };
    rest(&objects, ports, &places, mode, &chassis_of)
}

#[test]
fn a_guest_at_rest_gets_its_place_where_kubevirt_and_ovn_agree_that_it_is() {
    let running = json!({ "nodeName": "n1", "phase": "Running" });
    let here = || bound("a", Some("c1"), &[]);
    let astray = {
        vec![
            led("10.0.0.1", &["c2"]),
            led("fd00::1", &[]),
            led("10.0.0.2", &["c1"]),
        ]
    };
    let sets = RoutingMode::AddressSets;
    let Rest::Place(write) = at_rest(
        &running,
        &[here(), bound("b", Some("c1"), &[])],
        &astray,
        sets,
    ) else {
        panic!("it is placed");
    };
    let moves: Vec<_> = write
        .routes
        .iter()
        .map(|route| (route.route.as_str(), route.from.len(), route.to.as_deref()))
        .collect();
    assert_eq!(
        moves,
        [("10.0.0.1", 1, Some("c1")), ("fd00::1", 0, Some("c1"))]
    );
    let guards: Vec<_> = write.ports.iter().map(|port| port.port.as_str()).collect();
    assert_eq!(guards, ["a", "b"]);

    let settled = vec![led("10.0.0.1", &["c1"])];
    assert_eq!(at_rest(&running, &[here()], &settled, sets), Rest::Settled);
    let uncertain = [
        (
            "bound elsewhere",
            running.clone(),
            bound("b", Some("c2"), &[]),
        ),
        ("not bound", running.clone(), bound("b", None, &[])),
        (
            "on two chassis",
            running.clone(),
            bound("b", Some("c1"), &["c2"]),
        ),
        (
            "held by a handover",
            running.clone(),
            PortRow {
                binding: here().binding,
                ..port(Some(&mark("m-1", 7)))
            },
        ),
        (
            "stopped",
            json!({ "nodeName": "n1", "phase": "Succeeded" }),
            here(),
        ),
        ("nowhere yet", json!({}), here()),
    ];
    for (what, status, other) in uncertain {
        let found = at_rest(&status, &[here(), other], &astray, sets);
        assert_eq!(found, Rest::Settled, "{what}");
    }
}

#[test]
fn a_guest_whose_node_has_no_gateway_keeps_its_place_and_one_without_chassis_is_looked_at_again() {
    let sets = RoutingMode::AddressSets;
    let astray = vec![led("10.0.0.1", &["c2"])];
    let status = |node| json!({ "nodeName": node, "phase": "Running" });
    let ports = vec![bound("a", Some("c3"), &[])];
    assert_eq!(at_rest(&status("n3"), &ports, &astray, sets), Rest::Settled);
    assert_eq!(
        at_rest(&status("unknown"), &ports, &astray, sets),
        Rest::Unmapped
    );
    let none = at_rest(&status("unknown"), &[], &[], sets);
    assert_eq!(none, Rest::Settled);
}

#[test]
fn a_guest_that_static_routes_follow_is_in_no_place_set() {
    let status = json!({ "nodeName": "n1", "phase": "Running" });
    let ports = vec![bound("a", Some("c1"), &[])];
    let routes = vec![led("10.0.0.1", &["c1"]), led("fd00::1", &[])];
    let Rest::Place(write) = at_rest(&status, &ports, &routes, RoutingMode::StaticRoutes) else {
        panic!("it is taken out");
    };
    let [only] = &write.routes[..] else {
        panic!("{:?}", write.routes);
    };
    assert_eq!((only.route.as_str(), &only.to), ("10.0.0.1", &None));
}
