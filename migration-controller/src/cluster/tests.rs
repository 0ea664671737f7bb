use serde_json::json;

use super::*;

fn pod(value: serde_json::Value) -> LauncherPod {
    LauncherPod::from(serde_json::from_value::<Pod>(value).unwrap())
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

#[test]
fn a_pod_is_over_once_its_last_container_is() {
    let running = json!({ "name": "compute", "state": { "running": {} },
        "image": "", "imageID": "", "ready": true, "restartCount": 0 });
    let finished = |name: &str, at: &str| {
        json!({ "name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": { "exitCode": 0, "finishedAt": at } } })
    };
    let life = |phase: &str, containers: serde_json::Value| {
        let status = json!({ "phase": phase, "containerStatuses": containers });
        pod(json!({ "metadata": { "name": "p" }, "status": status })).life
    };
    let early = finished("a", "2026-09-01T10:00:01Z");
    let late = finished("b", "2026-09-01T10:00:09Z");
    assert_eq!(
        life("Succeeded", json!([late, early])),
        PodLife::Over(Some(at("2026-09-01T10:00:09Z")))
    );
    assert_eq!(life("Failed", json!([early, running])), PodLife::Alive);
    assert_eq!(life("Running", json!([early, late])), PodLife::Alive);
    assert_eq!(life("Failed", json!([])), PodLife::Over(None));
}

#[test]
fn pods_are_found_by_every_tie_to_their_vm() {
    let cluster = Cluster::default();
    let vm = VmName::new("tenant", "w0");
    let labelled = |name: &str, labels: serde_json::Value, annotations: serde_json::Value| {
        pod(json!({ "metadata": { "namespace": "tenant", "name": name,
            "labels": labels, "annotations": annotations } }))
    };
    {
        let mut state = cluster.write();
        let vmi = json!({ "metadata": { "namespace": "tenant", "name": "w0", "uid": "v-1" }, "spec": {} });
        let migration = json!({ "metadata": { "namespace": "tenant", "name": "m", "uid": "m-1" },
            "spec": { "vmiName": "w0" } });
        state
            .vmis
            .apply(Seen::Valid(Arc::new(serde_json::from_value(vmi).unwrap())));
        state.migrations.apply(Seen::Valid(Arc::new(
            serde_json::from_value(migration).unwrap(),
        )));
        for pod in [
            labelled(
                "by-domain",
                json!({}),
                json!({ "kubevirt.io/domain": "w0" }),
            ),
            labelled(
                "by-vmi",
                json!({ "kubevirt.io/created-by": "v-1" }),
                json!({}),
            ),
            labelled(
                "by-migration",
                json!({ "kubevirt.io/migrationJobUID": "m-1" }),
                json!({}),
            ),
            labelled(
                "of-another",
                json!({ "kubevirt.io/created-by": "v-2" }),
                json!({}),
            ),
        ] {
            let keys = state.pods.apply(Seen::Valid(Arc::new(pod.clone())));
            let expected: BTreeSet<_> = (pod.name() != "of-another")
                .then(|| vm.clone())
                .into_iter()
                .collect();
            assert_eq!(state.vms(&keys), expected, "{}", pod.name());
        }
    }
    let found = cluster.vm(&vm);
    let names: Vec<_> = found.pods.iter().map(|pod| pod.name()).collect();
    assert_eq!(names, ["by-domain", "by-migration", "by-vmi"]);
}

#[test]
fn a_malformed_object_is_reported_and_not_taken_for_absent() {
    let cluster = Cluster::default();
    let migration = json!({ "metadata": { "namespace": "tenant", "name": "m", "uid": "m-1" },
        "spec": { "vmiName": "w0" } });
    let migration: VirtualMachineInstanceMigration = serde_json::from_value(migration).unwrap();
    let meta = Box::new(migration.metadata.clone());
    let mut state = cluster.write();
    state.migrations.apply(Seen::Valid(Arc::new(migration)));
    let error = "invalid type".into();
    state.migrations.apply(Seen::Malformed { meta, error });
    let objects = state.vm(&VmName::new("tenant", "w0"));
    assert!(objects.migrations.is_empty());
    assert_eq!(
        objects.malformed,
        ["VirtualMachineInstanceMigration m cannot be read: invalid type"]
    );
}

#[test]
fn a_pod_that_cannot_be_read_is_not_gone_even_where_it_never_could() {
    let cluster = Cluster::default();
    let meta = json!({ "namespace": "tenant", "name": "virt-launcher-w0",
        "annotations": { "kubevirt.io/domain": "w0" } });
    let mut state = cluster.write();
    let keys = state.pods.apply(Seen::Malformed {
        meta: serde_json::from_value(meta).unwrap(),
        error: "invalid type".into(),
    });
    let vm = VmName::new("tenant", "w0");
    assert_eq!(state.vms(&keys), BTreeSet::from([vm.clone()]));
    assert_eq!(
        state.vm(&vm).malformed,
        ["Pod virt-launcher-w0 cannot be read: invalid type"]
    );
}

#[test]
fn a_handover_that_the_server_does_not_have_is_forgotten_unless_a_newer_one_is_known() {
    let cluster = Cluster::default();
    let handover = |version: &str| -> Handover {
        serde_json::from_value(json!({
            "metadata": { "namespace": "tenant", "name": "m", "resourceVersion": version },
            "spec": { "vm": { "name": "w0" }, "migration": { "name": "m", "uid": "m-1" },
                "epoch": 1 },
        }))
        .unwrap()
    };
    cluster.take_handover(handover("7"));
    cluster.drop_handover(&Arc::new(handover("6")));
    assert_eq!(cluster.vms_to_handle().len(), 1);
    cluster.drop_handover(&Arc::new(handover("7")));
    assert!(cluster.vms_to_handle().is_empty());
}
