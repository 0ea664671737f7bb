//! Interfaces as Open vSwitch's database has them.

use std::sync::Arc;

use node_hooks::ovs::{Interface, Interfaces, Ports};
use tokio::sync::watch;

use crate::support::{Ovs, soon};

type Watch = watch::Receiver<Arc<Interfaces>>;

async fn until(watch: &mut Watch, there: impl Fn(&Interfaces) -> bool) -> Arc<Interfaces> {
    let found = soon(watch.wait_for(|interfaces| there(interfaces))).await;
    found.unwrap().clone()
}

/// Adds a port with an interface for a logical port, as far as a database without a switch goes.
fn add(ovs: &Ovs, bridge: &str, name: &str, iface_id: &str, ofport: u32) {
    ovs.vsctl(&format!(
        "--no-wait add-port {bridge} {name} -- set interface {name} external_ids:iface-id={iface_id} ofport={ofport}"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn interfaces_of_the_bridge_by_iface_id_as_they_come_and_go() {
    let ovs = Ovs::database();
    let ports = Ports::connect(&ovs.remote(), "br-int").unwrap();
    let mut watch = ports.interfaces();
    ovs.vsctl("--no-wait add-br br-int -- add-br br-ex");
    add(&ovs, "br-int", "tap0", "ns.vm-0", 7);
    add(&ovs, "br-ex", "patch", "elsewhere", 7);
    ovs.vsctl("--no-wait add-port br-int other -- set interface br-int external_ids:iface-id=own");
    let known = until(&mut watch, |interfaces| !interfaces.is_empty()).await;
    let expected = Interface {
        name: "tap0".to_owned(),
        ofport: Some(7),
        ..Interface::default()
    };
    assert_eq!(*known, [("ns.vm-0".to_owned(), expected)].into());
    assert!(ports.is_synced());

    ovs.vsctl("--no-wait set interface tap0 external_ids:ovn-installed=true mac_in_use=\"52:54:00:01:02:03\"");
    let known = until(&mut watch, |interfaces| interfaces["ns.vm-0"].installed).await;
    let mac = "52:54:00:01:02:03".parse().unwrap();
    assert_eq!(known["ns.vm-0"].mac_in_use, Some(mac));

    ovs.vsctl("--no-wait set interface tap0 ofport=-1 error=gone");
    let known = until(&mut watch, |interfaces| {
        interfaces["ns.vm-0"].ofport.is_none()
    })
    .await;
    assert_eq!(known["ns.vm-0"].error.as_deref(), Some("gone"));

    ovs.vsctl("--no-wait set interface tap0 external_ids:iface-id=ns.vm-1");
    until(&mut watch, |interfaces| interfaces.keys().eq(["ns.vm-1"])).await;
    ovs.vsctl("--no-wait del-port tap0");
    until(&mut watch, Interfaces::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_are_there_and_wake_nobody() {
    let ovs = Ovs::database();
    ovs.vsctl("--no-wait add-br br-int");
    add(&ovs, "br-int", "tap0", "vm", 7);
    let ports = Ports::connect(&ovs.remote(), "br-int").unwrap();
    let mut watch = ports.interfaces();
    until(&mut watch, |interfaces| interfaces.contains_key("vm")).await;
    watch.mark_unchanged();
    ovs.vsctl("--no-wait set interface tap0 statistics:rx_packets=11 statistics:tx_packets=12 statistics:tx_dropped=3");
    soon(async {
        while ports.get("vm").unwrap().statistics.tx_dropped != 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let statistics = ports.get("vm").unwrap().statistics;
    assert_eq!((statistics.rx_packets, statistics.tx_packets), (11, 12));
    assert!(!watch.has_changed().unwrap());
    ovs.vsctl("--no-wait set interface tap0 ofport=8");
    soon(watch.changed()).await.unwrap();
    assert_eq!(watch.borrow()["vm"].ofport, Some(8));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_interfaces_the_one_that_ovn_installed_is_taken() {
    let ovs = Ovs::database();
    ovs.vsctl("--no-wait add-br br-int");
    add(&ovs, "br-int", "tap0", "vm", 7);
    let ports = Ports::connect(&ovs.remote(), "br-int").unwrap();
    let mut watch = ports.interfaces();
    until(&mut watch, |interfaces| interfaces.contains_key("vm")).await;
    add(&ovs, "br-int", "tap1", "vm", 8);
    for (installed, other) in [("tap0", "tap1"), ("tap1", "tap0")] {
        ovs.vsctl(&format!(
            "--no-wait set interface {installed} external_ids:ovn-installed=true -- --if-exists remove interface {other} \
             external_ids ovn-installed"
        ));
        let known = until(&mut watch, |interfaces| {
            interfaces["vm"].installed && interfaces["vm"].name == installed
        });
        known.await;
    }
    ovs.vsctl("--no-wait del-port tap1");
    until(&mut watch, |interfaces| interfaces["vm"].name == "tap0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_switch_numbers_its_ports() {
    let ovs = Ovs::switch();
    let ports = Ports::connect(&ovs.remote(), "br-int").unwrap();
    let mut watch = ports.interfaces();
    ovs.vsctl("add-port br-int p1 -- set interface p1 type=dummy ofport_request=9 external_ids:iface-id=vm");
    until(&mut watch, |interfaces| {
        interfaces.get("vm").is_some_and(|vm| vm.ofport == Some(9))
    })
    .await;
}
