//! What keeps a handover, or its routes, from getting where they should, on its record; and flips.

use super::*;
use crate::reconcile::Work;
use crate::reconcile::hindrance::{hindrance, in_vain};

fn degraded(record: &Record) -> (ConditionStatus, &str, &str) {
    let found = Condition::find(&record.status.conditions, ConditionType::Degraded).unwrap();
    (found.status, &found.reason, &found.message)
}

fn flip(from: &[&str], to: &str) -> Write {
    Write {
        step: Step::Flip,
        ports: Vec::new(),
        routes: vec![handover::RouteWrite {
            route: RouteKey::new("10.0.0.1"),
            from: from.iter().map(|&name| name.to_owned()).collect(),
            to: Some(to.to_owned()),
        }],
        raise_nb_cfg_from: None,
    }
}

/// A migration whose guest is about to go from n1 to n2.
fn moving() -> (VmObjects, Record) {
    let objects = VmObjects {
        vmi: Some(vmi(&json!({ "nodeName": "n1" }))),
        migrations: vec![migration("m-1", SECOND, "Running")],
        handovers: vec![handover("m-1", 7, Phase::Preparing)],
        ..VmObjects::default()
    };
    let record = load(&objects, &[port(None)]).remove("m-1").unwrap();
    (objects, record)
}

#[test]
fn a_flip_is_on_record_and_told() {
    let mut record = Record::of(&handover("m-1", 7, Phase::Switched), None);
    record.stepped(&flip(&["c1"], "c2"), moment(SECOND));
    assert_eq!(
        record.status.step(TimelineStep::Flipped),
        Some(moment(SECOND))
    );
    assert_eq!(news(&record), ["RoutesFollowed"]);
    let note = &record.news[0].note;
    assert!(
        note.contains("chassis c2") && note.contains("led to c1"),
        "{note}"
    );
}

#[test]
fn a_first_place_at_the_source_is_no_flip_and_neither_is_the_way_back() {
    let mut record = Record::of(&handover("m-1", 7, Phase::Preparing), None);
    record.stepped(&flip(&[], "c1"), moment(SECOND));
    assert_eq!(news(&record), [""; 0]);
    record.stepped(&flip(&["c2"], "c1"), moment(SECOND));
    assert_eq!(news(&record), ["RoutesReturned"]);
    assert_eq!(record.status.step(TimelineStep::Flipped), None);
}

#[test]
fn what_the_database_does_not_take_is_on_record_until_it_does() {
    let (objects, mut record) = moving();
    let rows = [bound("w0.tenant", Some("c1"), &[])];
    let now = moment(SECOND);
    for _ in 0..2 {
        let seen = look(&mut record, &objects, &rows);
        let decision = decide(&seen.observed);
        assert_eq!(
            decision.write.as_ref().map(|write| write.step),
            Some(Step::Arm)
        );
        record.reflect(&decision, &seen, now);
        record.not_written(Step::Arm, "no such column", now);
    }
    let (status, reason, message) = degraded(&record);
    assert_eq!((status, reason), (ConditionStatus::True, "CannotWrite"));
    assert!(
        message.contains("Arm") && message.contains("no such column"),
        "{message}"
    );
    let attention = |record: &Record| {
        let all = news(record);
        all.iter()
            .filter(|&&reason| reason == "NetworkNeedsAttention")
            .count()
    };
    assert_eq!(attention(&record), 1, "told once");
    let seen = look(&mut record, &objects, &rows);
    let write = decide(&seen.observed).write.unwrap();
    record.stepped(&write, now);
    assert_eq!(degraded(&record).0, ConditionStatus::False);
}

#[test]
fn routes_that_cannot_follow_are_on_record() {
    let (objects, mut record) = moving();
    let rows = [bound("w0.tenant", Some("c1"), &[])];
    let mut seen = look(&mut record, &objects, &rows);
    seen.observed.routes = vec![led("10.0.0.1", &["c1"])];
    seen.observed.gateways = ["c1".to_owned()].into();
    let places = Places {
        routes: seen.observed.routes.clone(),
        ..Places::default()
    };
    let sets = RoutingMode::AddressSets;
    let why = |seen: &Observation, mode, router| hindrance(seen, &places, mode, router);
    let told = why(&seen, sets, Some("cluster"));
    assert_eq!(
        told.as_deref(),
        Some("routes stay with the gateway of c1: chassis c2 has no gateway for ip4")
    );
    seen.hindrance = told;
    for _ in 0..2 {
        record.reflect(&decide(&seen.observed), &seen, moment(SECOND));
    }
    let (status, reason, _) = degraded(&record);
    assert_eq!((status, reason), (ConditionStatus::True, "RoutesStay"));
    let attention = news(&record);
    let attention = attention
        .iter()
        .filter(|&&reason| reason == "NetworkNeedsAttention");
    assert_eq!(attention.count(), 1, "told once");

    let statics = why(&seen, RoutingMode::StaticRoutes, None).unwrap();
    assert!(statics.contains("--cluster-router"), "{statics}");
    seen.ending = Ending::On(Side::Source);
    assert_eq!(
        why(&seen, sets, Some("cluster")),
        None,
        "nothing has to follow"
    );
    seen.ending = Ending::Running;
    seen.observed.gateways.insert("c2".to_owned());
    assert_eq!(why(&seen, sets, Some("cluster")), None);
}

#[test]
fn a_guest_whose_node_has_no_chassis_is_looked_at_when_a_node_or_chassis_changes() {
    use crate::cluster::Listener;

    let work = Work::new(Arc::default(), Arc::new(crate::metrics::Metrics::new()));
    work.unmapped().insert(vm());
    work.world_changed();
    assert_eq!(work.depth(), 0, "nb_cfg is not its business");
    work.nodes_changed();
    assert_eq!(work.depth(), 1);
}

#[test]
fn what_a_policy_asks_for_in_vain_is_said() {
    use handover::{FlipPolicy, FlipTiming};

    let policy = |routing: Value| {
        let policy = json!({ "metadata": { "name": "p" }, "spec": { "routing": routing } });
        crate::policy::Policy::try_from(from::<crate::api::HandoverPolicy>(policy)).unwrap()
    };
    let plain = FlipPolicy::default();
    let told = in_vain(&policy(json!({ "flip": "OnPause" })), plain, None);
    assert!(told.is_some_and(|told| told.contains("--cluster-router")));
    assert_eq!(in_vain(&policy(json!({})), plain, None), None);
    let both = FlipPolicy {
        timing: FlipTiming::OnPause,
        keep_egress: std::time::Duration::from_secs(1),
    };
    let told = in_vain(&policy(json!({ "flip": "OnPause" })), both, Some("cluster"));
    assert!(told.is_some_and(|told| told.contains("--keep-egress")));
    let told = in_vain(
        &policy(json!({ "flip": "OnPause" })),
        plain,
        Some("cluster"),
    );
    assert_eq!(told, None);
}

#[test]
fn what_was_not_seen_or_done_is_not_in_the_timeline() {
    let (objects, mut record) = moving();
    let at = moment(SECOND);
    record.status.take_step(TimelineStep::Armed, at);
    // Somebody else's list is still there, and the guest is nowhere.
    let mut row = port(None);
    row.options
        .insert("requested-chassis".into(), "c8,c9".into());
    let mut objects = objects;
    objects.migrations = vec![migration("m-1", SECOND, "Succeeded")];
    record.migration = objects.migrations.first().cloned();
    let seen = look(&mut record, &objects, std::slice::from_ref(&row));
    let mut decision = decide(&seen.observed);
    assert_ne!(decision.phase, Phase::Succeeded);
    decision.phase = Phase::Succeeded;
    record.reflect(&decision, &seen, at);
    for step in [TimelineStep::Settled, TimelineStep::Released] {
        assert_eq!(record.status.step(step), None);
    }
    // The network's owner has ended it: that is seen.
    let row = bound("w0.tenant", Some("c2"), &[]);
    let seen = look(&mut record, &objects, &[row]);
    record.reflect(&decide(&seen.observed), &seen, at);
    for step in [TimelineStep::Settled, TimelineStep::Released] {
        assert!(record.status.step(step).is_some());
    }
}

#[test]
fn a_failure_is_told_once_and_a_port_that_is_left_out_is_named() {
    let (objects, mut record) = moving();
    let rows = [bound("w0.tenant", Some("c1"), &[])];
    let seen = look(&mut record, &objects, &rows);
    let mut decision = decide(&seen.observed);
    decision.write = None;
    decision.phase = Phase::Failed;
    record.reflect(&decision, &seen, moment(SECOND));
    assert_eq!(news(&record), ["NetworkHandoverFailed"]);
    assert_eq!(degraded(&record).1, "Failed");

    decision.phase = Phase::Ready;
    decision.left_out = vec![PortName::new("w0.old")];
    record.reflect(&decision, &seen, moment(SECOND));
    let (status, reason, message) = degraded(&record);
    assert_eq!((status, reason), (ConditionStatus::True, "PortsLeftOut"));
    assert!(message.contains("w0.old"), "{message}");
}

#[test]
fn what_was_prepared_does_not_wait_for_the_guest_any_more() {
    let (objects, mut record) = moving();
    let rows = [bound("w0.tenant", Some("c1"), &[])];
    let seen = look(&mut record, &objects, &rows);
    let mut decision = decide(&seen.observed);
    decision.write = None;
    decision.waiting = Some(handover::Waiting::Guest);
    let said = |record: &Record| {
        let found = Condition::find(&record.status.conditions, ConditionType::Prepared).unwrap();
        (found.status, found.message.clone())
    };
    for (phase, message) in [
        (Phase::Ready, "ready: the guest has not moved yet"),
        (Phase::Succeeded, "it was before the guest moved"),
    ] {
        decision.phase = phase;
        record.reflect(&decision, &seen, moment(SECOND));
        let expected = (ConditionStatus::True, message.to_owned());
        assert_eq!(said(&record), expected);
    }
}
