//! A test for every row of the table in the module's documentation. Names of functions are those of kube-ovn v1.15.24.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use uuid::Uuid;

use super::cache::{Cache, Group, Port};
use super::groups;
use super::migrations::{self, Outcome};
use super::pods::{self, Owner, State};
use super::write::{Columns, Membership, Write};
use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration};

const PORT: Uuid = Uuid::from_u128(1);
const ADDRESSES: &str = "0a:58:0a:80:00:0a 10.128.0.10 fd00:10:128::a";
const VM: Owner = Owner {
    vmi: State::Present,
    is_owned: true,
    vm: State::Present,
};

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    owned.collect()
}

fn nodes() -> [String; 2] {
    ["node-1", "node-2"].map(str::to_owned)
}

fn subnets() -> [String; 1] {
    ["shared0".to_owned()]
}

/// A Northbound with the VM's port, which asks for this, in these port groups.
fn cache(options: &[(&str, &str)], groups: &[&str]) -> Cache {
    let port = Port {
        name: "web.demo".to_owned(),
        r#type: String::new(),
        options: map(options),
        external_ids: map(&[
            ("vendor", "kube-ovn"),
            ("pod", "demo/web"),
            ("ls", "shared0"),
            ("segue.io/owner", "m-1"),
        ]),
    };
    let made = groups::create(&Cache::default(), &nodes(), &subnets());
    let all = made.into_iter().map(|write| {
        let Write::CreateGroup { name, external_ids } = write else {
            panic!("a port group is made, not {write:?}");
        };
        Arc::new(Group {
            ports: groups
                .contains(&name.as_str())
                .then_some(PORT)
                .into_iter()
                .collect(),
            name,
            external_ids,
        })
    });
    Cache {
        groups: all.collect(),
        ports: [(PORT, Arc::new(port))].into(),
    }
}

/// A pod of the VM, with what the controller has noted on it.
fn pod(name: &str, node: Option<&str>, noted: &[&str], of_migration: bool) -> Pod {
    let mut annotations = map(&[
        ("ovn.kubernetes.io/logical_switch", "shared0"),
        ("ovn.kubernetes.io/mac_address", "0a:58:0a:80:00:0a"),
        ("ovn.kubernetes.io/ip_address", "10.128.0.10,fd00:10:128::a"),
    ]);
    for what in noted {
        annotations.insert(format!("ovn.kubernetes.io/{what}"), "true".to_owned());
    }
    let mut labels = BTreeMap::new();
    if of_migration {
        annotations.insert("kubevirt.io/migrationJobName".to_owned(), "m".to_owned());
        labels.insert("kubevirt.io/migrationJobUID", "m-1");
    }
    let owner = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": "web", "uid": "u",
    });
    serde_json::from_value(json!({
        "metadata": {
            "namespace": "demo", "name": name, "labels": labels, "annotations": annotations,
            "ownerReferences": [owner],
        },
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": "Running"},
    }))
    .unwrap()
}

fn all(pods: &[Pod]) -> Vec<&Pod> {
    pods.iter().collect()
}

fn ended(mut pod: Pod) -> Pod {
    pod.status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
    pod
}

fn deleted(pod: Pod) -> Pod {
    let mut value = serde_json::to_value(ended(pod)).unwrap();
    value["metadata"]["deletionTimestamp"] = json!("2026-09-01T10:00:00Z");
    serde_json::from_value(value).unwrap()
}

fn columns() -> Columns {
    Columns {
        name: "web.demo".to_owned(),
        addresses: ADDRESSES.to_owned(),
        port_security: None,
        external_ids: map(&[
            ("vendor", "kube-ovn"),
            ("pod", "demo/web"),
            ("ls", "shared0"),
        ]),
    }
}

fn join(group: &str) -> Write {
    Write::Groups(vec![Membership::Join(
        group.to_owned(),
        BTreeSet::from([PORT]),
    )])
}

fn leave(group: &str) -> Write {
    Write::Groups(vec![Membership::Leave(
        group.to_owned(),
        BTreeSet::from([PORT]),
    )])
}

fn options(pairs: &[(&str, &str)]) -> Write {
    Write::Options {
        port: PORT,
        options: map(pairs),
    }
}

/// `podNeedSync`, `reconcileAllocateSubnets`.
#[test]
fn a_new_pod_gets_its_port_once() {
    let first = pod("p0", None, &[], false);
    assert!(pods::needs_sync(&first));
    let writes = pods::allocate(&Cache::default(), &first).unwrap();
    let create = Write::Create {
        switch: "shared0".to_owned(),
        columns: columns(),
    };
    assert_eq!(writes.north, [create]);
    let noted = |what: &str| writes.annotations.get(&format!("ovn.kubernetes.io/{what}"));
    assert_eq!(noted("allocated").unwrap(), "true");
    assert_eq!(noted("logical_router").unwrap(), "ovn-cluster");

    let known = pod("p0", Some("node-1"), &["allocated"], false);
    let again = pods::allocate(&cache(&[], &[]), &known).unwrap();
    assert_eq!(again, pods::Writes::default());
    assert!(!pods::needs_sync(&pod(
        "p0",
        Some("node-1"),
        &["allocated", "routed"],
        false
    )));
}

/// `needAllocateSubnets`, `CreateLogicalSwitchPort`.
#[test]
fn every_change_of_a_migrations_pod_replaces_the_columns_but_options() {
    let target = pod("p1", Some("node-2"), &["allocated", "routed"], true);
    let there = cache(&[("requested-chassis", "node-1,node-2")], &[]);
    let replace = Write::Replace {
        port: PORT,
        columns: columns(),
    };
    // Nothing of what others have in external_ids stays.
    assert_eq!(pods::allocate(&there, &target).unwrap().north, [replace]);
    assert!(
        pods::allocate(&there, &ended(target))
            .unwrap()
            .north
            .is_empty()
    );
}

#[test]
fn a_replaced_row_leaves_options_alone() {
    let replace = Write::Replace {
        port: PORT,
        columns: columns(),
    };
    let text = format!("{:?}", replace.transaction());
    for column in [
        "addresses",
        "port_security",
        "external_ids",
        "dhcpv4_options",
        "dhcpv6_options",
    ] {
        assert!(text.contains(column), "{column} is not in {text}");
    }
    for absent in ["\"options\"", "Wait"] {
        assert!(!text.contains(absent), "{absent} is in {text}");
    }
}

#[test]
fn a_pod_that_asks_for_nothing_is_named_with_what_it_lacks() {
    let mut bare = pod("p0", None, &[], false);
    let annotations = bare.metadata.annotations.as_mut().unwrap();
    annotations.remove("ovn.kubernetes.io/mac_address");
    let missing = pods::allocate(&Cache::default(), &bare).unwrap_err();
    assert_eq!(missing, "ovn.kubernetes.io/mac_address");
}

#[test]
fn a_second_network_has_a_port_of_its_own() {
    let mut two = pod("p0", None, &[], false);
    two.metadata.annotations.as_mut().unwrap().extend(map(&[
        ("net1.demo.ovn.kubernetes.io/logical_switch", "shared1"),
        (
            "net1.demo.ovn.kubernetes.io/mac_address",
            "0a:58:0a:81:00:0a",
        ),
        ("net1.demo.ovn.kubernetes.io/ip_address", "10.129.0.10"),
    ]));
    let writes = pods::allocate(&Cache::default(), &two).unwrap();
    let ports = writes.north.iter().map(|write| match write {
        Write::Create { switch, columns } => (switch.as_str(), columns.name.as_str()),
        other => panic!("{other:?}"),
    });
    let ports: BTreeSet<_> = ports.collect();
    let expected = [
        ("shared0", "web.demo"),
        ("shared1", "web.demo.net1.demo.ovn"),
    ];
    assert_eq!(ports, expected.into());
}

/// `needRouteSubnets`, `reconcileRouteSubnets`.
#[test]
fn port_groups_follow_the_target_pod_as_soon_as_it_has_a_node() {
    let at_source = cache(&[], &["node.node.1", "shared0.node.1"]);
    let target = pod("p1", Some("node-2"), &["allocated"], true);
    let writes = pods::route(&at_source, &target);
    assert_eq!(
        writes.north,
        [
            leave("node.node.1"),
            join("node.node.2"),
            leave("shared0.node.1"),
            join("shared0.node.2")
        ]
    );
    assert_eq!(
        writes.annotations,
        map(&[("ovn.kubernetes.io/routed", "true")])
    );

    let routed = pod("p1", Some("node-2"), &["allocated", "routed"], true);
    assert_eq!(pods::route(&at_source, &routed), pods::Writes::default());
    let waiting = pod("p1", None, &["allocated"], true);
    assert_eq!(pods::route(&at_source, &waiting), pods::Writes::default());
}

fn migration(phase: &str) -> VirtualMachineInstanceMigration {
    serde_json::from_value(json!({
        "metadata": {"namespace": "demo", "name": "m", "uid": "m-1"},
        "spec": {"vmiName": "web"},
        "status": {"phase": phase, "migrationState": {"sourcePod": "p0"}},
    }))
    .unwrap()
}

/// A VMI on the first node whose last migration was this one.
fn vmi(uid: &str) -> VirtualMachineInstance {
    let state = json!({"migrationUid": uid, "sourceNode": "node-1", "targetNode": "node-2"});
    vmi_with(&state)
}

fn vmi_with(state: &Value) -> VirtualMachineInstance {
    serde_json::from_value(json!({
        "metadata": {"namespace": "demo", "name": "web"},
        "spec": {},
        "status": {"nodeName": "node-1", "migrationState": state},
    }))
    .unwrap()
}

fn decide(cache: &Cache, phase: &str, vmi: &VirtualMachineInstance, pods: &[Pod]) -> Outcome {
    migrations::decide(cache, &migration(phase), vmi, &all(pods))
}

const LIST: (&str, &str) = ("requested-chassis", "node-1,node-2");
const RARP: (&str, &str) = ("activation-strategy", "rarp");

/// `handleAddOrUpdateVMIMigration`, `SetLogicalSwitchPortMigrateOptions`.
#[test]
fn scheduling_asks_for_both_nodes_by_all_of_options() {
    let target = [pod("p1", Some("node-2"), &[], true)];
    // The VMI's state is the last migration's until the hand-over: its node is the source.
    let before =
        vmi_with(&json!({"migrationUid": "m-0", "sourceNode": "node-2", "targetNode": "node-1"}));
    let others = cache(
        &[("segue.io/epoch", "7"), ("requested-chassis", "node-1")],
        &[],
    );
    assert_eq!(
        decide(&others, "Scheduling", &before, &target),
        Outcome::Done(vec![options(&[("segue.io/epoch", "7"), LIST, RARP])])
    );
    // The list is there: whatever the strategy.
    let armed = cache(&[LIST], &[]);
    assert_eq!(
        decide(&armed, "Scheduling", &before, &target),
        Outcome::Done(Vec::new())
    );
    // Compared as text: in another order it is another.
    let turned = cache(&[("requested-chassis", "node-2,node-1")], &[]);
    let again = Outcome::Done(vec![options(&[LIST, RARP])]);
    assert_eq!(decide(&turned, "Scheduling", &before, &target), again);
}

#[test]
fn scheduling_without_a_node_is_tried_again_and_without_a_pod_is_not() {
    let cache = cache(&[], &[]);
    let waiting = [pod("p1", None, &[], true)];
    assert_eq!(
        decide(&cache, "Scheduling", &vmi("m-1"), &waiting),
        Outcome::Deferred
    );
    let nothing = Outcome::Done(Vec::new());
    assert_eq!(decide(&cache, "Scheduling", &vmi("m-1"), &[]), nothing);
    let other = [pod("p0", Some("node-1"), &[], false)];
    assert_eq!(decide(&cache, "Scheduling", &vmi("m-1"), &other), nothing);
    // Phases between are not its business.
    let target = [pod("p1", Some("node-2"), &[], true)];
    for phase in [
        "Pending",
        "Scheduled",
        "PreparingTarget",
        "TargetReady",
        "Running",
    ] {
        assert_eq!(
            decide(&cache, phase, &vmi("m-1"), &target),
            nothing,
            "{phase}"
        );
    }
}

/// `ResetLogicalSwitchPortMigrateOptions`.
#[test]
fn the_end_asks_for_the_guests_node_alone() {
    let armed = cache(&[LIST, RARP, ("other", "stays")], &[]);
    let reset = |node| {
        Outcome::Done(vec![options(&[
            ("requested-chassis", node),
            ("other", "stays"),
        ])])
    };
    assert_eq!(
        decide(&armed, "Succeeded", &vmi("m-1"), &[]),
        reset("node-2")
    );
    assert_eq!(decide(&armed, "Failed", &vmi("m-1"), &[]), reset("node-1"));
    // Whoever asked, and for whatever.
    let anothers = cache(&[("requested-chassis", "node-3"), ("other", "stays")], &[]);
    assert_eq!(
        decide(&anothers, "Succeeded", &vmi("m-1"), &[]),
        reset("node-2")
    );
    let nothing = Outcome::Done(Vec::new());
    assert_eq!(
        decide(&cache(&[RARP], &[]), "Succeeded", &vmi("m-1"), &[]),
        nothing
    );
}

/// With a stale or missing state of the VMI nothing is known of the nodes.
#[test]
fn the_end_of_a_migration_that_the_vmi_does_not_name_writes_nothing() {
    let armed = cache(&[LIST, RARP], &[]);
    let nothing = Outcome::Done(Vec::new());
    for vmi in [vmi("m-2"), vmi_with(&Value::Null)] {
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(decide(&armed, phase, &vmi, &[]), nothing, "{phase}");
        }
    }
}

/// `enqueueAddVMIMigration` at a restart: migration m-1 is long over, the next is scheduling, and the VMI's state is still
/// the one of m-1.
#[test]
fn a_restart_replays_the_reset_of_the_last_migration_over_the_list_of_the_next() {
    let next = cache(&[("requested-chassis", "node-2,node-1"), RARP], &[]);
    let replayed = Outcome::Done(vec![options(&[("requested-chassis", "node-2")])]);
    assert_eq!(decide(&next, "Succeeded", &vmi("m-1"), &[]), replayed);
}

/// `handleDeletePod`, `CleanLogicalSwitchPortMigrateOptions`, `hasAliveSiblingVMPod`.
#[test]
fn the_deletion_of_any_pod_strips_the_options_and_leaves_the_groups_of_a_living_one() {
    let armed = cache(
        &[LIST, RARP, ("other", "stays")],
        &["node.node.2", "shared0.node.2"],
    );
    let old = deleted(pod("p0", Some("node-1"), &["allocated", "routed"], false));
    let stripped = options(&[("other", "stays")]);
    let living = [pod("p1", Some("node-2"), &["allocated", "routed"], true)];
    assert_eq!(
        pods::delete(&armed, &old, VM, &all(&living)),
        std::slice::from_ref(&stripped)
    );

    let left = Write::Groups(
        ["node.node.2", "shared0.node.2"]
            .map(|group| Membership::Leave(group.to_owned(), BTreeSet::from([PORT])))
            .into(),
    );
    let ended = [ended(living[0].clone())];
    assert_eq!(
        pods::delete(&armed, &old, VM, &all(&ended)),
        [stripped, left]
    );
    // A strategy alone stays.
    let strategy = cache(&[RARP], &[]);
    assert_eq!(pods::delete(&strategy, &old, VM, &all(&living)), []);
}

/// `isVMToDel`, `appendCheckPodNetToDel`.
#[test]
fn the_port_goes_with_its_vm_and_with_any_pod_of_a_vmi_without_one() {
    let cache = cache(&[], &[]);
    let old = deleted(pod("p0", Some("node-1"), &[], false));
    let living = [pod("p1", Some("node-2"), &[], true)];
    let delete = [Write::Delete { port: PORT }];
    let written = |owner| pods::delete(&cache, &old, owner, &all(&living));
    let bare = Owner {
        is_owned: false,
        vm: State::Absent,
        ..VM
    };
    assert!(!bare.is_going());
    assert_eq!(written(bare), delete);
    let going = Owner {
        vmi: State::Deleting,
        ..bare
    };
    assert!(going.is_going());
    assert_eq!(written(going), delete);
    let vm_going = Owner {
        vmi: State::Absent,
        vm: State::Deleting,
        ..VM
    };
    assert!(vm_going.is_going());
    assert_eq!(written(vm_going), delete);
    // Stopped and started again: the VM is there, its VMI is not for a while.
    let stopped = Owner {
        vmi: State::Absent,
        ..VM
    };
    assert!(!stopped.is_going());
    assert_eq!(written(stopped), []);
}

/// `checkAndUpdateNodePortGroup`, `fetchPodsOnNode`.
#[test]
fn every_minute_both_pods_of_a_migration_put_the_port_into_their_nodes_groups() {
    let moved = cache(&[], &["node.node.2"]);
    let source = pod("p0", Some("node-1"), &["allocated"], false);
    let target = pod("p1", Some("node-2"), &["allocated"], true);
    let probe = |pods: &[Pod]| groups::probe(&moved, &nodes(), &all(pods));
    assert_eq!(
        probe(&[source.clone(), target.clone()]),
        [join("node.node.1")]
    );
    assert_eq!(probe(&[ended(source.clone()), target]), []);
    assert_eq!(
        probe(&[source]),
        [join("node.node.1"), leave("node.node.2")]
    );
}

/// `reconcileDistributedSubnetRouteInDefaultVpc`.
#[test]
fn a_start_puts_the_port_into_the_group_of_the_pod_that_comes_last() {
    let source = pod("p0", Some("node-1"), &["allocated"], false);
    let target = pod("p1", Some("node-2"), &["allocated"], true);
    let writes = |pods: &[Pod]| {
        groups::reconcile_subnets(&cache(&[], &[]), &subnets(), &nodes(), &all(pods))
    };
    let home = [leave("shared0.node.2"), join("shared0.node.1")];
    assert_eq!(writes(std::slice::from_ref(&source)), home);
    let away = [leave("shared0.node.1"), join("shared0.node.2")];
    let [first, second] = [home, away];
    assert_eq!(writes(&[source, target]), [first, second].concat());
}

/// `handleAddNode`, `createPortGroupForDistributedSubnet`.
#[test]
fn port_groups_are_made_once() {
    let made = groups::create(&Cache::default(), &nodes(), &subnets());
    let names: Vec<_> = made
        .iter()
        .map(|write| match write {
            Write::CreateGroup { name, .. } => name.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        names,
        [
            "node.node.1",
            "shared0.node.1",
            "node.node.2",
            "shared0.node.2"
        ]
    );
    assert!(names.iter().all(|name| super::is_of_node(name)));
    assert_eq!(groups::create(&cache(&[], &[]), &nodes(), &subnets()), []);
}
