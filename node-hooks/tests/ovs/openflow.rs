//! Opening ports on a real switch.

use arp_proxy::Mac;
use nix::sys::signal::Signal;
use node_hooks::announce;
use node_hooks::openflow::{Error, Keeper, PacketOuts, State, Switch};

use crate::support::{Ovs, soon};

const MAC: Mac = pnet_base::MacAddr(0x52, 0x54, 0, 1, 2, 3);
/// The first as OVN has it while a port waits for its machine: the frame is told of and goes on, all else is dropped.
const FLOWS: [&str; 5] = [
    "priority=1010,in_port=7,dl_type=0x8035,actions=controller(userdata=00.00.00.17),resubmit(,8)",
    "priority=1000,in_port=7,actions=drop",
    "priority=900,in_port=8,dl_type=0x8035,actions=drop",
    "table=8,priority=10,in_port=7,dl_type=0x8035,dl_src=52:54:00:01:02:03,actions=drop",
    "table=8,priority=9,actions=drop",
];

/// A switch with two ports and these flows.
fn switch() -> Ovs {
    let ovs = Ovs::switch();
    for port in [7, 8] {
        ovs.vsctl(&format!(
            "add-port br-int p{port} -- set interface p{port} type=dummy ofport_request={port}"
        ));
    }
    for flow in FLOWS {
        ovs.ofctl("add-flow", &[flow]);
    }
    ovs
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packet_out_goes_through_the_tables_as_if_its_port_had_received_it() {
    let ovs = switch();
    let opening = PacketOuts::opening([(7, MAC), (8, MAC)]).unwrap();
    let protocols = ["10", "11", "12", "13", "14", "15"];
    for (passes, version) in protocols.iter().enumerate() {
        ovs.vsctl(&format!("set bridge br-int protocols=OpenFlow{version}"));
        let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
        assert_eq!(switch.version().to_string().replace('.', ""), *version);
        let sent = switch.send(&opening).unwrap();
        assert!(sent.written_at_once().is_some());
        soon(sent.processed()).await.unwrap();
        let passes = u64::try_from(passes + 1).unwrap();
        assert_eq!(ovs.packets("priority=1010"), passes, "OpenFlow {version}");
        // Behind the activation, with its port and its sender's address as they were.
        assert_eq!(ovs.packets("table=8, n_packets"), passes);
        assert_eq!(ovs.packets("priority=900"), passes);
        assert_eq!(ovs.packets("priority=1000"), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_of_all_versions_is_spoken_and_announcements_pass() {
    let ovs = switch();
    let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
    assert_eq!(switch.version().to_string(), "1.5");
    let mut packets = PacketOuts::new();
    let addresses = ["10.0.0.1", "2001:db8::1"].map(|text| text.parse().unwrap());
    announce::through_switch(&mut packets, 7, MAC, &addresses).unwrap();
    soon(switch.send(&packets).unwrap().processed())
        .await
        .unwrap();
    // Two gratuitous ARPs and an advertisement, none of which opens anything.
    assert_eq!(ovs.packets("priority=1000"), 3);
    assert_eq!(ovs.packets("priority=1010"), 0);
    soon(switch.barrier()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_switch_has_no_room_for_is_its_word_not_silence() {
    let ovs = switch();
    ovs.vsctl("set bridge br-int protocols=OpenFlow13");
    let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
    // Of a number that a port may have, and none has: taken, and nothing comes of it.
    let sent = switch.packet_out(0xfeff, &node_hooks::openflow::rarp(MAC));
    soon(sent.unwrap().processed()).await.unwrap();
    assert!(matches!(
        switch.packet_out(0xff00, b""),
        Err(Error::Port(0xff00))
    ));
    assert!(switch.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lasts_while_nothing_is_to_be_said() {
    let ovs = switch();
    let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
    // Longer than this end waits before it asks whether the other is there.
    let waited = tokio::time::timeout(std::time::Duration::from_secs(11), switch.ended()).await;
    assert!(waited.is_err(), "{waited:?}");
    soon(switch.barrier()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_is_not_there_is_named() {
    let ovs = Ovs::database();
    let error = Switch::connect(&ovs.management()).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(error.to_string().contains("br-int.mgmt"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_survives_a_switch_that_starts_over() {
    let mut ovs = switch();
    let keeper = Keeper::start(ovs.management());
    let mut state = keeper.state();
    soon(state.wait_for(|state| matches!(state, State::Warm(_))))
        .await
        .unwrap();
    ovs.kill_switch();
    soon(state.wait_for(|state| matches!(state, State::Cold { .. })))
        .await
        .unwrap();
    assert!(!keeper.is_warm());
    let opening = PacketOuts::opening([(7, MAC)]).unwrap();
    ovs.start_switch();
    // As ovn-controller does when the bridge is back.
    ovs.vsctl("set bridge br-int fail-mode=secure");
    let sent = soon(keeper.send_when_warm(&opening)).await.unwrap();
    soon(sent.processed()).await.unwrap();
    assert!(keeper.is_warm());
    ovs.vsctl("del-br br-int");
    soon(state.wait_for(|state| matches!(state, State::Cold { .. })))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_frozen_switch_was_sent_is_done_when_it_goes_on() {
    let ovs = switch();
    let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
    ovs.signal_switch(Signal::SIGSTOP);
    let opening = PacketOuts::opening([(7, MAC)]).unwrap();
    let mut sent = switch.send(&opening).unwrap();
    // The socket takes it, the switch does nothing.
    soon(sent.written()).await.unwrap();
    let processed = tokio::spawn(sent.processed());
    ovs.signal_switch(Signal::SIGCONT);
    soon(processed).await.unwrap().unwrap();
    assert_eq!(ovs.packets("priority=1010"), 1);
}
