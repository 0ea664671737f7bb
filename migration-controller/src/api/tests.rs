use kube::CustomResourceExt;
use serde_json::json;

use super::*;

fn moment(text: &str) -> Moment {
    Moment::from_jiff(text.parse().unwrap())
}

#[test]
fn moments_keep_microseconds_and_no_more() {
    let moment = moment("2026-09-01T10:00:05.123456789Z");
    assert_eq!(json!(moment), json!("2026-09-01T10:00:05.123456Z"));
    let whole = serde_json::from_value::<Moment>(json!("2026-09-01T10:00:05Z")).unwrap();
    assert_eq!(json!(whole), json!("2026-09-01T10:00:05.000000Z"));
    assert_eq!(
        serde_json::from_value::<Moment>(json!(moment)).unwrap(),
        moment
    );
}

#[test]
fn a_step_taken_again_moves_to_its_new_time() {
    let mut status = HandoverStatus::default();
    status.take_step(TimelineStep::Armed, moment("2026-09-01T10:00:01Z"));
    status.take_step(TimelineStep::Ready, moment("2026-09-01T10:00:02Z"));
    status.take_step(TimelineStep::Armed, moment("2026-09-01T10:00:03Z"));
    let steps: Vec<_> = status.timeline.iter().map(|entry| entry.step).collect();
    assert_eq!(steps, [TimelineStep::Ready, TimelineStep::Armed]);
    status.take_step_once(TimelineStep::Ready, moment("2026-09-01T10:00:09Z"));
    assert_eq!(
        status.step(TimelineStep::Ready),
        Some(moment("2026-09-01T10:00:02Z"))
    );
}

#[test]
fn a_condition_keeps_its_transition_time_while_its_status_stays() {
    let mut conditions = Vec::new();
    let set = |conditions: &mut Vec<Condition>, status, reason, at| {
        Condition::set(
            conditions,
            ConditionType::Prepared,
            status,
            reason,
            "",
            moment(at),
        );
    };
    set(
        &mut conditions,
        ConditionStatus::False,
        "Claim",
        "2026-09-01T10:00:01Z",
    );
    set(
        &mut conditions,
        ConditionStatus::False,
        "Barrier",
        "2026-09-01T10:00:02Z",
    );
    let [only] = &conditions[..] else {
        panic!("{conditions:?}");
    };
    assert_eq!(only.reason, "Barrier");
    assert_eq!(only.last_transition_time, moment("2026-09-01T10:00:01Z"));
    set(
        &mut conditions,
        ConditionStatus::True,
        "Ready",
        "2026-09-01T10:00:03Z",
    );
    assert_eq!(
        conditions[0].last_transition_time,
        moment("2026-09-01T10:00:03Z")
    );
}

#[test]
fn the_schema_knows_every_phase() {
    // The match is exhaustive: a phase added to the core stops the build here, next to the list.
    for phase in PHASES {
        match phase {
            Phase::Pending
            | Phase::Preparing
            | Phase::Ready
            | Phase::Switching
            | Phase::Switched
            | Phase::Finalising
            | Phase::Succeeded
            | Phase::RollingBack
            | Phase::RolledBack
            | Phase::Failed => {}
        }
    }
    let crd = json!(Handover::crd());
    let phase = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
        ["phase"];
    assert_eq!(phase["enum"].as_array().map(Vec::len), Some(PHASES.len()));
    assert!(
        phase["enum"]
            .as_array()
            .unwrap()
            .contains(&json!("RollingBack"))
    );
}

#[test]
fn status_without_anything_is_pending() {
    let status: HandoverStatus = serde_json::from_value(json!({})).unwrap();
    assert_eq!(status, HandoverStatus::default());
    assert_eq!(status.phase, Phase::Pending);
}
