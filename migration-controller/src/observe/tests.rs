mod turns;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use handover::{
    Binding, Epoch, GuestPlace, Original, Phase, SignalKind, SignalSource, Step, decide,
};
use serde_json::{Value, json};

use super::*;
use crate::api::{EarlyOpening, MigrationReference, OpeningResult, Place, SignalSeen, VmReference};
use crate::cluster::{LauncherPod, PodLife};
use crate::kubevirt::VirtualMachineInstance;

const UID: &str = "m-1";
const NOW: &str = "2026-09-01T10:10:00Z";

/// A VM on `n1` that migrates to `n2`, as the stores and replicas have it.
struct World {
    objects: VmObjects,
    migration: Option<VirtualMachineInstanceMigration>,
    ports: Vec<PortRow>,
    /// Chassis by node.
    chassis: BTreeMap<&'static str, Chassis>,
    now: Moment,
    spec: HandoverSpec,
    status: HandoverStatus,
    learned: Learned,
}

fn moment(text: &str) -> Moment {
    Moment::from_jiff(text.parse().unwrap())
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn vmi(status: &Value) -> Arc<VirtualMachineInstance> {
    Arc::new(from(json!({
        "metadata": { "name": "w0", "namespace": "tenant", "uid": "v-1" },
        "spec": {}, "status": status,
    })))
}

fn migration(phase: &str) -> VirtualMachineInstanceMigration {
    from(json!({
        "metadata": { "name": "m", "namespace": "tenant", "uid": UID },
        "spec": { "vmiName": "w0" }, "status": { "phase": phase },
    }))
}

fn state(uid: &str, rest: &Value) -> Value {
    let mut state = json!({ "migrationUid": uid, "sourceNode": "n1", "targetNode": "n2",
        "sourcePod": "pod-a", "targetPod": "pod-b" });
    for (key, value) in rest.as_object().unwrap() {
        state[key] = value.clone();
    }
    state
}

fn pod(name: &str, node: Option<&str>, job: Option<&str>, life: PodLife) -> Arc<LauncherPod> {
    let labels = job.map(|job| json!({ "kubevirt.io/migrationJobUID": job }));
    Arc::new(LauncherPod {
        meta: from(json!({ "name": name, "namespace": "tenant", "labels": labels })),
        node: node.map(Into::into),
        life,
    })
}

fn row(name: &str) -> PortRow {
    PortRow {
        uuid: uuid::Uuid::nil(),
        name: PortName::new(name),
        addresses: Vec::new(),
        options: BTreeMap::new(),
        external_ids: BTreeMap::new(),
        binding: Binding {
            chassis: Some("c1".into()),
            additional: Vec::new(),
        },
        activated: BTreeSet::new(),
    }
}

fn mark(epoch: u64) -> Mark {
    Mark {
        migration: MigrationUid::new(UID),
        epoch: Epoch(epoch),
        source: "c1".into(),
        target: "c2".into(),
        original: Original::default(),
        barrier: Some(4),
        source_released: false,
    }
}

fn marked(mut row: PortRow, mark: &Mark) -> PortRow {
    for (key, value) in mark.to_external_ids() {
        row.external_ids.insert(key.into(), value);
    }
    row
}

fn told(kind: SignalKind, source: SignalSource, at: &str) -> SignalSeen {
    SignalSeen {
        kind,
        source,
        at: moment(at),
        node: Some("n1".into()),
    }
}

fn place(node: &str) -> Place {
    Place {
        node: node.into(),
        ..Place::default()
    }
}

impl World {
    fn new() -> Self {
        Self {
            objects: VmObjects {
                vmi: Some(vmi(&json!({ "nodeName": "n1" }))),
                pods: vec![
                    pod("pod-a", Some("n1"), None, PodLife::Alive),
                    pod("pod-b", Some("n2"), Some(UID), PodLife::Alive),
                ],
                ..VmObjects::default()
            },
            migration: Some(migration("Scheduling")),
            ports: vec![row("w0.tenant")],
            chassis: BTreeMap::from([
                ("n1", Chassis::new("c1", "n1")),
                ("n2", Chassis::new("c2", "n2")),
                ("n3", Chassis::new("c3", "n3")),
            ]),
            now: moment(NOW),
            spec: HandoverSpec {
                vm: VmReference {
                    name: "w0".into(),
                    uid: Some("v-1".into()),
                },
                migration: MigrationReference {
                    name: "m".into(),
                    uid: UID.into(),
                },
                epoch: 7,
                source: None,
                target: None,
                ports: Vec::new(),
            },
            status: HandoverStatus::default(),
            learned: Learned::default(),
        }
    }

    /// With a source and a target on record.
    fn recorded() -> Self {
        let mut world = Self::new();
        world.spec.source = Some(place("n1"));
        world.spec.target = Some(place("n2"));
        world
    }

    fn observe(&mut self) -> Observation {
        let chassis = self.chassis.clone();
        let inputs = Inputs {
            now: self.now,
            objects: &self.objects,
            migration: self.migration.as_ref(),
            former: &[],
            ports: &self.ports,
            routes: (&[], &BTreeSet::new()),
            flip: FlipPolicy::default(),
            barrier: Barrier {
                nb_cfg: 4,
                applied: [("c1".to_owned(), 4), ("c2".to_owned(), 4)].into(),
            },
            chassis_of: &|node| chassis.get(node).cloned(),
            patience: Patience {
                deadlines: Deadlines::default(),
                pod_gone_grace: Duration::from_mins(1),
            },
            learned: &self.learned,
        };
        observe(&inputs, &mut self.spec, &mut self.status)
    }
}

fn names(seen: &Observation) -> (Option<&str>, Option<&str>) {
    fn name(chassis: Option<&Chassis>) -> Option<&str> {
        chassis.map(|chassis| chassis.name.as_str())
    }
    let observed = &seen.observed;
    (
        name(observed.source.as_ref()),
        name(observed.target.as_ref()),
    )
}

// === Places ===

#[test]
fn the_target_pods_node_is_enough_to_arm() {
    let mut world = World::new();
    let seen = world.observe();
    assert_eq!(names(&seen), (Some("c1"), Some("c2")));
    assert_eq!(decide(&seen.observed).write.unwrap().step, Step::Arm);
    let source = world.spec.source.unwrap();
    assert_eq!(source.pod.as_deref(), Some("pod-a"));
    assert_eq!(source.chassis.as_deref(), Some("c1"));
    assert_eq!(world.spec.target.unwrap().pod.as_deref(), Some("pod-b"));
}

#[test]
fn a_pod_that_copied_the_source_nodes_label_does_not_mislead() {
    let mut world = World::new();
    let mut target = LauncherPod::clone(&world.objects.pods[1]);
    let labels = target.meta.labels.as_mut().unwrap();
    labels.insert("kubevirt.io/nodeName".into(), "n1".into());
    target.node = None;
    world.objects.pods[1] = Arc::new(target);
    assert_eq!(names(&world.observe()), (Some("c1"), None));
}

#[test]
fn the_source_stays_when_the_vms_node_flips() {
    let told = state(UID, &json!({}));
    let mut world = World::recorded();
    world.objects.vmi = Some(vmi(&json!({ "nodeName": "n2", "migrationState": told })));
    assert_eq!(names(&world.observe()), (Some("c1"), Some("c2")));
    // What is written for it says where it left from, whatever KubeVirt says of the next migration.
    let mut world = World::recorded();
    world.ports = vec![marked(row("w0.tenant"), &mark(7))];
    world.objects.vmi = Some(vmi(&json!({ "nodeName": "n2" })));
    assert_eq!(names(&world.observe()), (Some("c1"), Some("c2")));
}

#[test]
fn a_source_on_record_is_history_while_nothing_is_written() {
    let mut world = World::recorded();
    world.spec.source = Some(place("n3"));
    assert_eq!(names(&world.observe()), (Some("c1"), Some("c2")));
}

#[test]
fn the_state_of_the_migration_before_says_nothing_about_this_one() {
    let stale = state(
        "m-0",
        &json!({ "sourceNode": "n3", "targetNode": "n1", "completed": true }),
    );
    let mut world = World::new();
    world.objects.vmi = Some(vmi(&json!({ "nodeName": "n1", "migrationState": stale })));
    let seen = world.observe();
    assert_eq!(names(&seen), (Some("c1"), Some("c2")));
    assert_eq!(seen.observed.outcome, Outcome::Running);
    assert!(world.status.signals.is_empty());
}

#[test]
fn kubevirts_word_on_the_source_outweighs_a_record_made_of_old_news() {
    let mut world = World::recorded();
    world.spec.source = Some(place("n3"));
    let told = state(UID, &json!({}));
    world.objects.vmi = Some(vmi(&json!({ "nodeName": "n1", "migrationState": told })));
    assert_eq!(names(&world.observe()), (Some("c1"), Some("c2")));
}

#[test]
fn a_chassis_that_left_the_southbound_is_remembered() {
    let mut world = World::new();
    world.observe();
    world.chassis.remove("n1");
    assert_eq!(names(&world.observe()), (Some("c1"), Some("c2")));
}

#[test]
fn a_source_that_is_the_target_is_old_news() {
    let mut world = World::new();
    world.objects.vmi = Some(vmi(&json!({ "nodeName": "n2" })));
    let seen = world.observe();
    assert_eq!(names(&seen), (None, Some("c2")));
    assert_eq!(decide(&seen.observed).write, None);
}

#[test]
fn a_migration_to_another_cluster_has_no_target_here() {
    let mut world = World::new();
    world.migration.as_mut().unwrap().spec.send_to = Some(json!({}));
    assert_eq!(names(&world.observe()), (None, None));
}

// === Outcome ===

#[test]
fn the_outcome_is_fused_from_whoever_tells() {
    let ended = |rest: Value| state(UID, &rest);
    let succeeded = ended(json!({ "completed": true }));
    let failed = ended(json!({ "completed": true, "failed": true }));
    let unfinished = ended(json!({}));
    let target = Ending::On(Side::Target);
    let source = Ending::On(Side::Source);
    // (migration's phase or gone, VM's node, VM's migration state, ending)
    let cases: [(Option<&str>, &str, &Value, &Ending); 16] = [
        (Some("Running"), "n1", &unfinished, &Ending::Running),
        (Some("Running"), "n1", &Value::Null, &Ending::Running),
        (Some("Running"), "n2", &unfinished, &Ending::Running),
        (Some("Running"), "n2", &succeeded, &target),
        (Some("Running"), "n1", &succeeded, &target),
        (Some("Running"), "n1", &failed, &source),
        (Some("Succeeded"), "n1", &unfinished, &target),
        (Some("Succeeded"), "n1", &Value::Null, &target),
        (Some("Failed"), "n1", &unfinished, &source),
        (Some("Failed"), "n2", &unfinished, &target),
        (Some("Failed"), "n2", &succeeded, &target),
        (Some("Failed"), "", &Value::Null, &source),
        (None, "n1", &unfinished, &Ending::Running),
        (None, "n2", &succeeded, &target),
        (None, "n1", &Value::Null, &source),
        (
            None,
            "n3",
            &Value::Null,
            &Ending::Elsewhere {
                node: "n3".into(),
                followed: false,
            },
        ),
    ];
    for (phase, node, state, expected) in cases {
        let mut world = World::recorded();
        world.migration = phase.map(migration);
        world.objects.vmi = Some(vmi(&json!({ "nodeName": node, "migrationState": state })));
        let seen = world.observe();
        assert_eq!(seen.ending, *expected, "{phase:?}, on {node:?}, {state}");
        let over = world.status.step(TimelineStep::MigrationEnded).is_some();
        assert_eq!(
            over,
            *expected != Ending::Running,
            "{phase:?}, on {node:?}, {state}"
        );
    }
}

#[test]
fn a_vanished_migration_is_over_once_its_target_pod_is_gone() {
    let mut world = World::recorded();
    world.migration = None;
    world.objects.vmi = Some(vmi(
        &json!({ "nodeName": "n1", "migrationState": state(UID, &json!({})) }),
    ));
    assert_eq!(world.observe().ending, Ending::Running);
    world.objects.pods.retain(|pod| pod.name() != "pod-b");
    assert_eq!(world.observe().ending, Ending::On(Side::Source));
}

#[test]
fn a_guest_is_gone_with_its_instance() {
    let gone = |vmi: Option<Arc<VirtualMachineInstance>>| {
        let mut world = World::recorded();
        world.objects.vmi = vmi;
        world.observe().observed.outcome
    };
    assert_eq!(gone(None), Outcome::GuestGone);
    let failed = vmi(&json!({ "phase": "Failed" }));
    assert_eq!(gone(Some(failed)), Outcome::GuestGone);
    let mut another = VirtualMachineInstance::clone(&vmi(&json!({ "nodeName": "n1" })));
    another.metadata.uid = Some("v-2".into());
    assert_eq!(gone(Some(Arc::new(another))), Outcome::GuestGone);
}

#[test]
fn a_vm_that_has_not_been_seen_yet_is_not_gone() {
    let mut world = World::new();
    world.spec.vm.uid = None;
    world.objects.vmi = None;
    let seen = world.observe();
    assert_eq!(seen.observed.outcome, Outcome::Running);
    assert_eq!(decide(&seen.observed).phase, Phase::Pending);
    world.migration = Some(migration("Failed"));
    assert_eq!(world.observe().observed.outcome, Outcome::GuestGone);
}

#[test]
fn a_guest_that_has_moved_on_takes_its_ports_with_it() {
    let mut world = World::recorded();
    world.migration = None;
    world.ports = vec![marked(row("w0.tenant"), &mark(7))];
    world.objects.vmi = Some(vmi(&json!({ "nodeName": "n3" })));
    let seen = world.observe();
    assert_eq!(names(&seen), (Some("c1"), Some("c3")));
    assert_eq!(seen.observed.outcome, Outcome::GuestOn(Side::Target));
}

#[test]
fn the_end_keeps_the_time_it_was_first_seen() {
    let mut world = World::recorded();
    world.migration = Some(migration("Succeeded"));
    world.observe();
    world.now = moment("2026-09-01T10:20:00Z");
    let seen = world.observe();
    assert_eq!(seen.observed.since.outcome, Some(moment(NOW).into()));
}

// === Signals ===

#[test]
fn each_sign_of_the_resume_is_noted_with_its_source() {
    let ready = json!({ "targetNodeDomainReadyTimestamp": "2026-09-01T10:00:11Z" });
    let mut world = World::recorded();
    world.observe();
    assert!(world.status.signals.is_empty());

    let mut port = marked(row("w0.tenant"), &mark(7));
    port.binding.additional = vec!["c2".into()];
    port.activated = BTreeSet::from(["c2".into()]);
    world.ports = vec![port];
    let mut target = LauncherPod::clone(&world.objects.pods[1]);
    target.meta.annotations = from(json!({ "kubevirt.io/migration-target-ready-timestamp": "?" }));
    world.objects.pods[1] = Arc::new(target);
    world.objects.vmi = Some(vmi(
        &json!({ "nodeName": "n1", "migrationState": state(UID, &ready) }),
    ));
    world.observe();
    let sources: Vec<_> = world
        .status
        .signals
        .iter()
        .map(|seen| seen.source)
        .collect();
    assert_eq!(
        sources,
        [
            SignalSource::Activation,
            SignalSource::DomainReady,
            SignalSource::PodAnnotation
        ]
    );
    assert_eq!(world.status.step(TimelineStep::Resumed), Some(moment(NOW)));

    world.now = moment("2026-09-01T10:20:00Z");
    world.migration = Some(migration("Succeeded"));
    world.observe();
    let last = world.status.signals.last().unwrap();
    assert_eq!(
        (last.source, last.at),
        (SignalSource::MigrationEnd, world.now)
    );
    assert_eq!(world.status.step(TimelineStep::Resumed), Some(moment(NOW)));
}

#[test]
fn an_activation_that_is_not_this_handovers_is_no_signal() {
    let activated = |row: PortRow| {
        let mut row = row;
        row.activated = BTreeSet::from(["c2".into()]);
        row.binding.additional = vec!["c2".into()];
        row
    };
    let unmarked = activated(row("w0.tenant"));
    let of_another = activated(marked(row("w0.tenant"), &mark(6)));
    let mut not_additional = activated(marked(row("w0.tenant"), &mark(7)));
    not_additional.binding.additional.clear();
    for port in [unmarked, of_another, not_additional] {
        let mut world = World::recorded();
        world.ports = vec![port.clone()];
        world.observe();
        assert!(world.status.signals.is_empty(), "{port:?}");
    }
}

#[test]
fn a_guest_that_never_left_has_not_come_back() {
    let mut world = World::recorded();
    world.migration = Some(migration("Failed"));
    world.observe();
    assert_eq!(world.status.signals().guest(), GuestPlace::Source);

    let mut world = World::recorded();
    world
        .status
        .note_signal(told(SignalKind::Paused, SignalSource::Libvirt, NOW));
    world.migration = Some(migration("Failed"));
    world.observe();
    assert_eq!(world.status.signals().guest(), GuestPlace::BackOnSource);
}

// === Agents ===

fn opening(result: OpeningResult) -> EarlyOpening {
    EarlyOpening {
        result,
        reason: None,
        paused_at: moment(NOW),
        paused_to_seen_us: Some(90),
        paused_to_heard_us: Some(250),
        heard_to_received_us: Some(120),
        received_to_sent_us: Some(40),
        sent_to_processed_us: None,
    }
}

/// A port that the target has claimed and activated, with the handover in flight.
fn activated() -> World {
    let mut world = World::recorded();
    let mut row = marked(row("w0.tenant"), &mark(7));
    row.binding.additional = vec!["c2".into()];
    row.activated = ["c2".to_owned()].into();
    world.ports = vec![row];
    world
}

#[test]
fn an_activation_that_an_agent_may_have_caused_is_no_sign_of_the_guest() {
    for (result, is_sign) in [
        (OpeningResult::Asked, false),
        (OpeningResult::Opened, false),
        (OpeningResult::NoAgent, true),
        (OpeningResult::Stale, true),
    ] {
        let mut world = activated();
        world.learned = Learned {
            signals: vec![told(SignalKind::Paused, SignalSource::Libvirt, NOW)],
            opening: Some(opening(result)),
            ..Learned::default()
        };
        world.observe();
        // However long ago, and whoever is still there to tell.
        world.now = moment("2026-09-01T11:10:00Z");
        world.learned = Learned::default();
        let place = world.observe().observed.signals.guest();
        let expected = if is_sign {
            GuestPlace::Target
        } else {
            GuestPlace::InTransit
        };
        assert_eq!(place, expected, "{result:?}");
        let resumed = world.status.step(TimelineStep::Resumed);
        assert_eq!(resumed.is_some(), is_sign, "{result:?}");
    }
}

#[test]
fn an_activation_from_before_the_target_followed_is_no_sign_of_the_guest() {
    let mut world = activated();
    let behind = Mark {
        barrier: Some(5),
        ..mark(7)
    };
    world.ports = vec![marked(world.ports[0].clone(), &behind)];
    assert_eq!(world.observe().observed.signals.guest(), GuestPlace::Source);
}

#[test]
fn only_what_masquerade_does_not_hide_is_announced() {
    let interfaces = |interfaces: Value| {
        let instance = json!({
            "metadata": { "name": "w0", "namespace": "tenant", "uid": "v-1" },
            "spec": { "domain": { "devices": { "interfaces": interfaces } } },
            "status": { "nodeName": "n1" },
        });
        let mut world = World::new();
        world.objects.vmi = Some(Arc::new(from(instance)));
        let mut labelled = row("a-port");
        labelled.addresses = vec!["0A:00:00:00:00:01 10.0.0.1".into()];
        world.ports = vec![row("w0.tenant"), row("w0.tenant.blue.tenant.ovn"), labelled];
        let seen = world.observe();
        let ports = seen.observed.ports.iter();
        ports.map(|port| port.announces).collect::<Vec<_>>()
    };
    let bridge = json!({ "name": "b", "bridge": {}, "macAddress": "0a:00:00:00:00:01" });
    let hidden = json!({ "name": "a", "masquerade": {} });
    assert_eq!(interfaces(json!([bridge])), [true, true, true]);
    assert_eq!(interfaces(json!([hidden])), [false, false, false]);
    assert_eq!(interfaces(json!([hidden, bridge])), [false, true, true]);
    let other = json!({ "name": "b", "bridge": {} });
    assert_eq!(interfaces(json!([hidden, other])), [false, true, false]);
}

#[test]
fn what_agents_told_is_recorded_with_its_stamp_and_the_timeline_has_the_earliest() {
    let mut world = World::recorded();
    let at = |millis: u32| format!("2026-09-01T10:09:59.{millis:03}Z");
    let resumed = |source, millis| told(SignalKind::ResumedOnTarget, source, &at(millis));
    world.learned.signals = vec![
        told(SignalKind::Paused, SignalSource::Libvirt, &at(100)),
        resumed(SignalSource::Libvirt, 140),
    ];
    world.observe();
    world.learned.signals.push(resumed(SignalSource::Rarp, 120));
    world.observe();
    let status = &world.status;
    let sources: Vec<_> = status.signals.iter().map(|seen| seen.source).collect();
    let expected = [
        SignalSource::Libvirt,
        SignalSource::Rarp,
        SignalSource::Libvirt,
    ];
    assert_eq!(sources, expected);
    assert!(status.signals.iter().all(|seen| seen.node.is_some()));
    assert_eq!(status.step(TimelineStep::Paused), Some(moment(&at(100))));
    assert_eq!(status.step(TimelineStep::Resumed), Some(moment(&at(120))));
}

#[test]
fn what_agents_measured_outlives_the_controller_that_they_told() {
    let mut world = World::recorded();
    let opening = opening(OpeningResult::Opened);
    let opened = moment("2026-09-01T10:10:00.0004Z");
    world.learned = Learned {
        opening: Some(opening.clone()),
        opened_at: Some(opened),
        pause_ms: Some(42.5),
        blackout_ms: Some(43.25),
        ..Learned::default()
    };
    world.observe();
    // Another controller, to which nobody has told anything.
    world.learned = Learned::default();
    world.observe();
    let status = &world.status;
    assert_eq!(status.early_opening, Some(opening));
    assert_eq!(
        (status.pause_ms, status.blackout_ms),
        (Some(42.5), Some(43.25))
    );
    assert_eq!(status.step(TimelineStep::Opened), Some(opened));
}

// === Pods ===

#[test]
fn a_finished_pod_is_gone_after_its_grace() {
    let life = |finished: &str| PodLife::Over(Some(finished.parse().unwrap()));
    // (the source pod, gone, look again)
    let cases = [
        (None, true, None),
        (Some(PodLife::Alive), false, None),
        (Some(PodLife::Over(None)), false, None),
        (Some(life("2026-09-01T10:09:00Z")), true, None),
        (
            Some(life("2026-09-01T10:09:30Z")),
            false,
            Some("2026-09-01T10:10:30Z"),
        ),
    ];
    for (life, gone, recheck) in cases {
        let mut world = World::recorded();
        world.spec.source.as_mut().unwrap().pod = Some("pod-a".into());
        world.objects.pods = life
            .map(|life| pod("pod-a", Some("n1"), None, life))
            .into_iter()
            .collect();
        let seen = world.observe();
        assert_eq!(seen.observed.source_pod_gone, gone, "{life:?}");
        assert_eq!(seen.recheck, recheck.map(moment), "{life:?}");
    }
}

#[test]
fn a_pod_that_was_once_a_target_is_a_source_now() {
    let mut world = World::new();
    world.objects.pods[0] = pod("pod-a", Some("n1"), Some("m-0"), PodLife::Alive);
    let seen = world.observe();
    assert!(!seen.observed.source_pod_gone);
    assert_eq!(world.spec.source.unwrap().pod.as_deref(), Some("pod-a"));
}

// === Ports ===

#[test]
fn a_damaged_mark_is_reported_and_its_port_left_alone() {
    let mut world = World::new();
    let mut damaged = marked(row("w0.tenant.blue"), &mark(7));
    damaged
        .external_ids
        .insert("segue.io/epoch".into(), "soon".into());
    world.ports.push(damaged);
    let seen = world.observe();
    assert_eq!(seen.damaged.len(), 1);
    assert_eq!(seen.damaged[0].0, PortName::new("w0.tenant.blue"));
    let write = decide(&seen.observed).write.unwrap();
    let written: Vec<_> = write
        .ports
        .iter()
        .map(|write| write.port.to_string())
        .collect();
    assert_eq!(written, ["w0.tenant"]);
}

#[test]
fn steps_that_a_crash_kept_from_the_record_are_found_on_the_port() {
    let mut world = World::recorded();
    let with_barrier = Mark {
        barrier: Some(4),
        ..mark(7)
    };
    let mut port = marked(row("w0.tenant"), &with_barrier);
    port.options
        .insert("requested-chassis".into(), "c1,c2".into());
    world.ports = vec![port];
    let seen = world.observe();
    assert_eq!(world.status.step(TimelineStep::Armed), Some(moment(NOW)));
    assert_eq!(seen.observed.since.barrier, Some(moment(NOW).into()));

    // A port that was never armed, and is being set right after a migration nobody watched.
    let mut world = World::recorded();
    let mut port = marked(row("w0.tenant"), &mark(7));
    port.options.insert("requested-chassis".into(), "c2".into());
    world.ports = vec![port];
    world.observe();
    assert_eq!(world.status.step(TimelineStep::Armed), None);
    assert_eq!(world.status.step(TimelineStep::Settled), Some(moment(NOW)));
}

// === Pre-flight ===

#[test]
fn what_cannot_keep_its_connections_is_named() {
    let vmi = |interfaces: Value| -> VirtualMachineInstance {
        from(
            json!({ "metadata": {}, "spec": { "domain": { "devices": { "interfaces": interfaces } } } }),
        )
    };
    let fine = vmi(json!([
        { "name": "a", "bridge": {} }, { "name": "b", "binding": { "name": "l2bridge" } },
    ]));
    assert_eq!(preflight(&fine), None);
    let mixed = vmi(json!([
        { "name": "a", "bridge": {} }, { "name": "b", "masquerade": {} }, { "name": "c", "sriov": {} },
    ]));
    let found = preflight(&mixed).unwrap();
    assert_eq!(found.reason, "Masquerade");
    assert!(
        found.message.contains("interface b is bound by masquerade"),
        "{}",
        found.message
    );
    assert!(
        found.message.contains("interface c is an SR-IOV"),
        "{}",
        found.message
    );
    assert!(!found.message.contains("interface a"), "{}", found.message);
    assert!(found.certain);
}

#[test]
fn a_binding_that_is_not_known_is_not_called_compatible() {
    let vmi = |interfaces: Value| -> VirtualMachineInstance {
        from(
            json!({ "metadata": {}, "spec": { "domain": { "devices": { "interfaces": interfaces } } } }),
        )
    };
    let found = |interfaces: Value| preflight(&vmi(interfaces)).unwrap();
    let plugin = found(json!([
        { "name": "a", "bridge": {} }, { "name": "b", "binding": { "name": "Passt" } },
    ]));
    assert_eq!((plugin.certain, plugin.reason), (false, "UnknownBinding"));
    assert!(
        plugin
            .message
            .starts_with("interface b is bound by the plugin Passt,"),
        "{}",
        plugin.message
    );
    // A plugin without a name, and a member that is not known.
    for other in [json!({ "binding": {} }), json!({ "passtBinding": {} })] {
        let other = found(json!([other]));
        assert_eq!((other.certain, other.reason), (false, "UnknownBinding"));
    }
    for name in ["vhostuser", "my-vhost-user", "OVS-DPDK"] {
        let found = found(json!([{ "name": "b", "binding": { "name": name } }]));
        assert_eq!((found.certain, found.reason), (true, "VhostUser"), "{name}");
    }
    // What is certain outweighs what is not, and both are said.
    let both = found(json!([
        { "name": "a", "binding": { "name": "x" } }, { "name": "b", "sriov": {} },
    ]));
    assert_eq!((both.certain, both.reason), (true, "Sriov"));
    assert!(both.message.contains("interface a") && both.message.contains("interface b"));
}
