//! The stand-in for KubeVirt on a real API, with a hypervisor in memory. No root needed.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

mod cluster;
mod fake;
mod plugins;

use std::{
    collections::HashSet,
    pin::pin,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use scenarios::kubevirt::{
    Delays, DomainState, Limits, MigrationState, Role, VirtualMachineInstance,
    VirtualMachineInstanceMigration, VmimPhase, names,
};
use serde_json::json;

use cluster::{Cluster, within};
use fake::Copies;

fn state(vmi: &VirtualMachineInstance) -> MigrationState {
    vmi.status
        .as_ref()
        .and_then(|status| status.migration_state.clone())
        .unwrap_or_default()
}

fn node(vmi: &VirtualMachineInstance) -> &str {
    vmi.status.as_ref().unwrap().node_name.as_deref().unwrap()
}

fn phases(migration: &VirtualMachineInstanceMigration) -> Vec<VmimPhase> {
    let transitions = &migration
        .status
        .as_ref()
        .unwrap()
        .phase_transition_timestamps;
    transitions
        .iter()
        .map(|transition| transition.phase)
        .collect()
}

fn pod_phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

/// Waits until the copy is under way and the target's domain is known.
async fn copying(
    cluster: &Cluster,
    vmi: &str,
    migration: &VirtualMachineInstanceMigration,
) -> VirtualMachineInstance {
    cluster
        .wait_phase(&migration.name_any(), VmimPhase::Running)
        .await;
    let uid = migration.uid();
    cluster
        .wait_vmi(vmi, |vmi| {
            state(vmi).migration_uid == uid && state(vmi).target_node_domain_detected
        })
        .await
}

#[tokio::test]
async fn a_migration_walks_through_the_states_of_kubevirt() {
    let cluster = Cluster::start(&["a", "b"]).await;
    let vmi = cluster.run_vm("vm0").await;
    assert_eq!(node(&vmi), "a");
    assert_eq!(vmi.labels()[names::NODE_NAME], "a");
    assert_eq!(
        cluster.fake.domain("a", "default_vm0"),
        Some(DomainState::Running)
    );
    assert_eq!(cluster.fake.ports(), ["a/vm0.default"]);
    let chassis =
        cluster.nodes().get("b").await.unwrap().annotations()["k8s.ovn.org/node-chassis-id"]
            .clone();
    assert_eq!(chassis, "chassis-b");

    let recorded = cluster
        .record("vm0", |vmi| {
            state(vmi).completed && !vmi.labels().contains_key(names::MIGRATION_TARGET_NODE_NAME)
        })
        .await;
    let migration = cluster.migrate("m1", "vm0").await;
    let vmi = copying(&cluster, "vm0", &migration).await;

    // While the copy runs: two ports, and nothing says yet that the target is anything but a copy.
    cluster
        .wait_ports(&["a/vm0.default", "b/vm0.default"])
        .await;
    assert_eq!(
        (node(&vmi), vmi.labels()[names::NODE_NAME].as_str()),
        ("a", "a")
    );
    assert_eq!(vmi.labels()[names::MIGRATION_TARGET_NODE_NAME], "b");
    assert_eq!(state(&vmi).target_node_domain_ready_timestamp, None);
    let target = cluster.target_pod(&migration).await;
    assert_eq!(
        target.labels()[names::NODE_NAME],
        "a",
        "a copied label: it names the source"
    );
    assert_eq!(target.annotations()[names::MIGRATION_JOB_NAME], "m1");
    assert!(
        !target
            .annotations()
            .contains_key(names::TARGET_READY_TIMESTAMP)
    );

    cluster.fake.copies(Copies::Succeed);
    let migration = cluster.wait_final("m1").await;
    assert_eq!(
        phases(&migration),
        [
            VmimPhase::Pending,
            VmimPhase::Scheduling,
            VmimPhase::Scheduled,
            VmimPhase::PreparingTarget,
            VmimPhase::TargetReady,
            VmimPhase::Running,
            VmimPhase::Succeeded,
        ]
    );
    let last = migration
        .status
        .as_ref()
        .unwrap()
        .migration_state
        .clone()
        .unwrap();
    assert_eq!(last.target_pod, Some(target.name_any()));
    assert!(last.completed && !last.failed && last.source_pod.is_some());

    assert_order(
        &within("the record", recorded).await.unwrap(),
        &migration.uid().unwrap(),
    );

    let source = last.source_pod.clone().unwrap();
    cluster
        .wait_pod(&source, |pod| pod_phase(pod) == Some("Succeeded"))
        .await;
    cluster.wait_ports(&["b/vm0.default"]).await;
    let target = cluster
        .wait_pod(&target.name_any(), |pod| {
            pod.labels()[names::NODE_NAME] == "b"
        })
        .await;
    let vmi = cluster.wait_vmi("vm0", |_| true).await;
    assert_as_the_real_one_left_it(&vmi, &target, &last);
    let ready = &target.annotations()[names::TARGET_READY_TIMESTAMP];
    assert!(
        ready.ends_with(" +0000 UTC") && ready.len() == "2026-09-01 10:00:11 +0000 UTC".len(),
        "{ready}"
    );

    let events = cluster.events_on(&migration.uid().unwrap()).await;
    for reason in [
        "SuccessfulCreate",
        "SuccessfulHandOver",
        "SuccessfulMigration",
    ] {
        assert!(
            events.iter().any(|event| event == reason),
            "{reason} in {events:?}"
        );
    }
    cluster.stop().await;
}

/// What the real virt-controller and virt-handler were seen to leave.
fn assert_as_the_real_one_left_it(vmi: &VirtualMachineInstance, pod: &Pod, state: &MigrationState) {
    let status = vmi.status.as_ref().unwrap();
    assert_eq!(status.selinux_context.as_deref(), Some("none"));
    let pods = &status.active_pods;
    assert_eq!(pods.len(), 2, "the one that has ended stays among them");
    let side_cars = pod
        .status
        .as_ref()
        .unwrap()
        .init_container_statuses
        .as_ref();
    assert_eq!(side_cars.unwrap().len(), 1, "the console's");
    assert!(state.migration_configuration.is_some() && state.target_memory_overhead.is_some());
}

type Step = fn(&VirtualMachineInstance) -> bool;

/// Each field of `migrationState` comes no earlier than those that it follows from, and none goes. That the copy has
/// started and that the target has the domain is said by two virt-handlers, in either order.
fn assert_order(record: &[VirtualMachineInstance], uid: &str) {
    let is_of_this =
        |vmi: &&VirtualMachineInstance| state(vmi).migration_uid.as_deref() == Some(uid);
    let of_this: Vec<_> = record.iter().filter(is_of_this).collect();
    assert!(
        first_is_bare(of_this.first().unwrap()),
        "the hand-over starts afresh"
    );

    let target: Step = |vmi| state(vmi).target_node.is_some() && state(vmi).source_node.is_some();
    let address: Step = |vmi| state(vmi).target_node_address.is_some();
    let start: Step = |vmi| state(vmi).start_timestamp.is_some();
    let detected: Step = |vmi| state(vmi).target_node_domain_detected;
    let ready: Step = |vmi| state(vmi).target_node_domain_ready_timestamp.is_some();
    let moved: Step = |vmi| node(vmi) == "b" && vmi.labels()[names::NODE_NAME] == "b";
    let end: Step = |vmi| state(vmi).end_timestamp.is_some();
    let completed: Step = |vmi| state(vmi).completed;
    for chain in [
        [target, address, start, ready, moved, end, completed].as_slice(),
        &[address, detected, ready],
    ] {
        let first = |there: &Step| of_this.iter().position(|vmi| there(vmi)).unwrap();
        let firsts: Vec<_> = chain.iter().map(first).collect();
        assert!(firsts.is_sorted(), "{firsts:?}");
        for (there, first) in chain.iter().zip(&firsts) {
            assert!(
                of_this.iter().skip(*first).all(|vmi| there(vmi)),
                "something went away: {firsts:?}"
            );
        }
    }
}

fn first_is_bare(vmi: &VirtualMachineInstance) -> bool {
    let state = state(vmi);
    state.target_node_address.is_none() && state.start_timestamp.is_none() && !state.completed
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn there_and_back_leaves_nothing_of_the_first_migration_in_the_second() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    cluster.fake.copies(Copies::Succeed);
    cluster.migrate("there", "vm0").await;
    cluster.wait_final("there").await;

    cluster.fake.copies(Copies::Wait);
    let back = cluster.migrate("back", "vm0").await;
    let vmi = copying(&cluster, "vm0", &back).await;
    assert_eq!(
        (
            state(&vmi).source_node.as_deref(),
            state(&vmi).target_node.as_deref()
        ),
        (Some("b"), Some("a"))
    );
    assert!(state(&vmi).end_timestamp.is_none() && !state(&vmi).completed);
    assert_eq!(
        cluster.target_pod(&back).await.labels()[names::NODE_NAME],
        "b"
    );

    cluster.fake.copies(Copies::Succeed);
    cluster.wait_final("back").await;
    let vmi = cluster.wait_vmi("vm0", |vmi| state(vmi).completed).await;
    assert_eq!(node(&vmi), "a");
    cluster.wait_ports(&["a/vm0.default"]).await;
    assert_eq!(cluster.fake.domain("b", "default_vm0"), None);
    cluster.stop().await;
}

#[tokio::test]
async fn a_migration_that_is_deleted_while_it_copies_is_aborted() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    let migration = cluster.migrate("m1", "vm0").await;
    copying(&cluster, "vm0", &migration).await;
    let target = cluster.target_pod(&migration).await;

    cluster.cancel("m1").await;
    cluster
        .wait_gone::<VirtualMachineInstanceMigration>("m1")
        .await;
    let vmi = cluster.wait_vmi("vm0", |vmi| state(vmi).failed).await;
    let aborted = state(&vmi);
    assert!(aborted.abort_requested && aborted.completed && aborted.end_timestamp.is_some());
    assert_eq!(aborted.abort_status.as_deref(), Some("Succeeded"));
    assert_eq!(
        aborted.failure_reason.as_deref(),
        Some("Live migration has been aborted")
    );
    assert_eq!(node(&vmi), "a");

    cluster
        .wait_pod(&target.name_any(), |pod| {
            pod_phase(pod) == Some("Succeeded")
        })
        .await;
    cluster.wait_ports(&["a/vm0.default"]).await;
    assert_eq!(
        cluster.fake.domain("a", "default_vm0"),
        Some(DomainState::Running)
    );
    let events = cluster.events_on(&migration.uid().unwrap()).await;
    assert!(
        events
            .iter()
            .any(|event| event == "SuccessfulAbortMigration"),
        "{events:?}"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_migration_that_is_deleted_before_its_target_runs_leaves_no_trace() {
    let mut cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    cluster.kubevirt.switch_off(Role::Kubelet).await;
    let migration = cluster.migrate("m1", "vm0").await;
    cluster.wait_phase("m1", VmimPhase::Scheduling).await;
    let target = cluster.target_pod(&migration).await;

    cluster.cancel("m1").await;
    cluster
        .wait_gone::<VirtualMachineInstanceMigration>("m1")
        .await;
    cluster.wait_gone::<Pod>(&target.name_any()).await;
    let vmi = cluster.wait_vmi("vm0", |_| true).await;
    assert_eq!(state(&vmi), MigrationState::default());
    assert_eq!(cluster.fake.copies_started(), 0);
    cluster.stop().await;
}

#[tokio::test]
async fn a_copy_that_fails_leaves_the_vm_where_it_is_and_the_next_one_succeeds() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    let migration = cluster.migrate("m1", "vm0").await;
    copying(&cluster, "vm0", &migration).await;
    let target = cluster.target_pod(&migration).await.name_any();

    cluster.fake.copies(Copies::Fail(
        "operation failed: job 'migration out' failed in post-copy phase",
    ));
    let migration = cluster.wait_final("m1").await;
    assert_eq!(
        migration.status.as_ref().unwrap().phase,
        Some(VmimPhase::Failed)
    );
    let last = migration.status.unwrap().migration_state.unwrap();
    assert!(last.failed && last.completed && last.target_node_domain_ready_timestamp.is_none());
    assert!(last.failure_reason.unwrap().contains("migration out"));
    assert_eq!((last.abort_requested, last.abort_status), (false, None));

    cluster
        .wait_pod(&target, |pod| pod_phase(pod) == Some("Succeeded"))
        .await;
    cluster.wait_ports(&["a/vm0.default"]).await;
    let vmi = cluster
        .wait_vmi("vm0", |vmi| {
            !vmi.labels().contains_key(names::MIGRATION_TARGET_NODE_NAME)
        })
        .await;
    assert_eq!(node(&vmi), "a");

    cluster.fake.copies(Copies::Succeed);
    cluster.migrate("m2", "vm0").await;
    let migration = cluster.wait_final("m2").await;
    assert_eq!(migration.status.unwrap().phase, Some(VmimPhase::Succeeded));
    cluster.wait_ports(&["b/vm0.default"]).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_target_pod_that_is_killed_fails_the_migration() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    let migration = cluster.migrate("m1", "vm0").await;
    copying(&cluster, "vm0", &migration).await;
    let target = cluster.target_pod(&migration).await.name_any();

    cluster
        .api::<Pod>()
        .delete(&target, &DeleteParams::default())
        .await
        .unwrap();
    let migration = cluster.wait_final("m1").await;
    assert_eq!(migration.status.unwrap().phase, Some(VmimPhase::Failed));
    cluster.wait_gone::<Pod>(&target).await;
    cluster
        .wait_vmi("vm0", |vmi| {
            state(vmi).failed && state(vmi).completed && node(vmi) == "a"
        })
        .await;
    cluster.wait_ports(&["a/vm0.default"]).await;
    assert_eq!(
        cluster.fake.domain("a", "default_vm0"),
        Some(DomainState::Running)
    );
    cluster.stop().await;
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn a_role_that_is_off_is_missed_and_makes_up_for_it() {
    let mut cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    let migration = cluster.migrate("m1", "vm0").await;
    copying(&cluster, "vm0", &migration).await;

    // The copy is virt-launcher's: it ends without virt-handler, and nobody says so.
    cluster.kubevirt.switch_off(Role::VirtHandler).await;
    cluster.kubevirt.switch_off(Role::VirtController).await;
    cluster.fake.copies(Copies::Succeed);
    cluster.wait_ports(&["b/vm0.default"]).await;
    assert_eq!(
        cluster.fake.domain("b", "default_vm0"),
        Some(DomainState::Running)
    );
    let vmi = cluster.wait_vmi("vm0", |_| true).await;
    assert!(node(&vmi) == "a" && state(&vmi).target_node_domain_ready_timestamp.is_none());

    // virt-handler reports; the migration stays where it was without virt-controller.
    cluster.switch_on(Role::VirtHandler);
    cluster
        .wait_vmi("vm0", |vmi| state(vmi).completed && node(vmi) == "b")
        .await;
    let api = cluster.api::<VirtualMachineInstanceMigration>();
    assert_eq!(
        api.get("m1").await.unwrap().status.unwrap().phase,
        Some(VmimPhase::Running)
    );

    cluster.switch_on(Role::VirtController);
    let migration = cluster.wait_final("m1").await;
    assert_eq!(migration.status.unwrap().phase, Some(VmimPhase::Succeeded));
    assert_eq!(cluster.fake.copies_started(), 1);
    cluster.stop().await;
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn somebody_who_writes_into_a_vmi_delays_its_migration_and_does_not_break_it() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.run_vm("vm0").await;
    cluster.fake.copies(Copies::Succeed);
    let meddler = tokio::spawn(meddle(cluster.api()));
    cluster.migrate("m1", "vm0").await;
    let migration = cluster.wait_final("m1").await;
    assert!(!meddler.is_finished());
    meddler.abort();
    assert_eq!(migration.status.unwrap().phase, Some(VmimPhase::Succeeded));
    let vmi = cluster.wait_vmi("vm0", |vmi| state(vmi).completed).await;
    assert_eq!(node(&vmi), "b");
    // At least: hand-over, preparation, start, detection, readiness with acknowledgement, completion.
    let writes: u32 = vmi.annotations()["example.com/count"].parse().unwrap();
    assert!(writes >= 5, "{writes}");
    cluster.stop().await;
}

/// Follows every write of somebody else with one of its own. It remembers all of those, not just
/// the last: two foreign writes in a row bring two own ones back, and taking the first of them for
/// foreign would start an endless conversation with itself that lets nobody else write.
async fn meddle(api: Api<VirtualMachineInstance>) {
    let mut seen = pin!(watcher(api.clone(), watcher::Config::default()).applied_objects());
    let (mut count, mut own) = (0u32, HashSet::new());
    while let Some(vmi) = seen.next().await {
        if own.contains(&vmi.unwrap().resource_version()) {
            continue;
        }
        count += 1;
        let patch = json!({"metadata": {"annotations": {"example.com/count": count.to_string()}}});
        let patched = api
            .patch("vm0", &PatchParams::default(), &Patch::Merge(patch))
            .await;
        own.insert(patched.unwrap().resource_version());
    }
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn a_migration_waits_for_room_and_a_second_one_of_the_same_vm_is_refused() {
    let cluster = Cluster::with(
        &["a", "b", "c"],
        Limits {
            per_cluster: 1,
            ..Limits::default()
        },
        Delays::NONE,
    )
    .await;
    cluster.run_vm("vm0").await;
    cluster.run_vm("vm1").await;
    let first = cluster.migrate("first", "vm0").await;
    copying(&cluster, "vm0", &first).await;

    cluster.migrate("again", "vm0").await;
    let refused = cluster.wait_phase("again", VmimPhase::Failed).await;
    assert_eq!(phases(&refused), [VmimPhase::Failed]);

    let second = cluster.migrate("second", "vm1").await;
    cluster.wait_phase("second", VmimPhase::Pending).await;
    let of_second = format!("{}={}", names::MIGRATION_JOB_UID, second.uid().unwrap());
    let targets = cluster
        .api::<Pod>()
        .list(&ListParams::default().labels(&of_second))
        .await
        .unwrap();
    assert!(targets.items.is_empty(), "no room, no target");

    cluster.fake.copies(Copies::Succeed);
    let (first, second) = (
        cluster.wait_final("first").await,
        cluster.wait_final("second").await,
    );
    for migration in [first, second] {
        assert_eq!(migration.status.unwrap().phase, Some(VmimPhase::Succeeded));
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_deleted_vm_takes_its_pod_and_port_along() {
    let cluster = Cluster::start(&["a"]).await;
    cluster.run_vm("vm0").await;
    cluster
        .api::<VirtualMachineInstance>()
        .delete("vm0", &DeleteParams::default())
        .await
        .unwrap();
    cluster.wait_gone::<VirtualMachineInstance>("vm0").await;
    assert!(
        cluster
            .api::<Pod>()
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
    assert_eq!(
        (
            cluster.fake.ports(),
            cluster.fake.domain("a", "default_vm0")
        ),
        (Vec::new(), None)
    );
    cluster.stop().await;
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn delays_are_kept_and_a_domain_that_runs_is_not_reported_before() {
    let delays = Delays {
        domain_notification: Duration::from_millis(600),
        launcher_exit: Duration::from_millis(900),
        sandbox_teardown: Duration::from_millis(300),
        ..Delays::NONE
    };
    let cluster = Cluster::with(&["a", "b"], Limits::default(), delays).await;
    cluster.run_vm("vm0").await;
    let migration = cluster.migrate("m1", "vm0").await;
    copying(&cluster, "vm0", &migration).await;

    let released = Instant::now();
    cluster.fake.copies(Copies::Succeed);
    let is_ready =
        |vmi: &VirtualMachineInstance| state(vmi).target_node_domain_ready_timestamp.is_some();
    cluster.wait_vmi("vm0", is_ready).await;
    assert!(released.elapsed() >= delays.domain_notification);
    cluster.wait_ports(&["b/vm0.default"]).await;
    assert!(released.elapsed() >= delays.launcher_exit + delays.sandbox_teardown);
    cluster.wait_final("m1").await;
    cluster.stop().await;
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn a_target_that_fits_nowhere_fails_the_migration_and_a_busy_hypervisor_is_asked_again() {
    let limits = Limits {
        unschedulable: Duration::from_secs(1),
        ..Limits::default()
    };
    let cluster = Cluster::with(&["a", "b"], limits, Delays::NONE).await;
    cluster.run_vm("vm0").await;
    cluster.nodes().cordon("b").await.unwrap();
    let migration = cluster.migrate("nowhere", "vm0").await;
    let migration_uid = migration.uid().unwrap();
    let failed = cluster.wait_final("nowhere").await;
    assert_eq!(
        phases(&failed),
        [VmimPhase::Pending, VmimPhase::Scheduling, VmimPhase::Failed]
    );
    let events = cluster.events_on(&migration_uid).await;
    for reason in ["migrationTargetPodUnschedulable", "FailedMigration"] {
        let told = events.iter().any(|event| event == reason);
        assert!(told, "{reason} in {events:?}");
    }

    cluster.nodes().uncordon("b").await.unwrap();
    cluster.fake.refuse_preparations(1);
    cluster.fake.copies(Copies::Succeed);
    cluster.migrate("m1", "vm0").await;
    let done = cluster.wait_final("m1").await;
    assert_eq!(done.status.unwrap().phase, Some(VmimPhase::Succeeded));
    let vmi = cluster.wait_vmi("vm0", |vmi| node(vmi) == "b").await;
    let events = cluster.events_on(&vmi.uid().unwrap()).await;
    assert!(
        events.iter().any(|event| event == "SyncFailed"),
        "{events:?}"
    );
    cluster.stop().await;
}

#[tokio::test]
#[ignore = "keeps the fast tier fast: make test runs it"]
async fn old_migrations_go_and_take_the_pod_that_they_left_behind_along() {
    let limits = Limits {
        kept_when_final: 1,
        ..Limits::default()
    };
    let cluster = Cluster::with(&["a", "b"], limits, Delays::NONE).await;
    cluster.run_vm("vm0").await;
    cluster.fake.copies(Copies::Succeed);
    cluster.migrate("first", "vm0").await;
    let first = cluster.wait_final("first").await;
    let left_behind = first
        .status
        .unwrap()
        .migration_state
        .unwrap()
        .source_pod
        .unwrap();
    cluster
        .wait_pod(&left_behind, |pod| pod_phase(pod) == Some("Succeeded"))
        .await;

    cluster.migrate("second", "vm0").await;
    cluster.wait_final("second").await;
    cluster
        .wait_gone::<VirtualMachineInstanceMigration>("first")
        .await;
    cluster.wait_gone::<Pod>(&left_behind).await;
    cluster.wait_ports(&["a/vm0.default"]).await;
    cluster.stop().await;
}
