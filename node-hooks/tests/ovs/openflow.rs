//! Opening ports on a real switch.

use std::collections::BTreeSet;
use std::io::Write as _;

use arp_proxy::Mac;
use nix::sys::signal::Signal;
use node_hooks::announce;
use node_hooks::openflow::{Error, Keeper, PacketOuts, State, Switch};

use crate::support::{Ovs, soon, until};

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

/// What ovn-controller has for a port that waits for its machine, and what it may have beside it. The cookie is that of
/// the port's binding, except for the last.
const WAITING: [&str; 6] = [
    "cookie=0xc0dec0de,priority=1010,in_port=7,dl_type=0x8035,actions=controller(userdata=00.00.00.17),resubmit(,8)",
    "cookie=0xc0dec0de,priority=1000,in_port=7,actions=drop",
    "table=65,cookie=0xc0dec0de,priority=1000,metadata=0x1,reg15=0x2,actions=drop",
    "table=65,cookie=0xc0dec0de,priority=100,metadata=0x1,reg15=0x2,actions=output:7",
    "table=44,cookie=0xc0dec0de,priority=100,metadata=0x1,reg15=0x2,actions=drop",
    "table=65,cookie=0xc0ffee,priority=1000,metadata=0x1,reg15=0x3,actions=drop",
];
/// What shuts the port of these, in the switch's words.
const SHUTTING: [&str; 2] = [
    "cookie=0xc0dec0de, priority=1000,in_port=7 actions=drop",
    "cookie=0xc0dec0de, table=65, priority=1000,reg15=0x2,metadata=0x1 actions=drop",
];

/// A switch with a port that waits, and one that does not.
fn waiting() -> Ovs {
    let ovs = switch();
    ovs.ofctl("del-flows", &[]);
    add(&ovs, &WAITING);
    ovs
}

fn add(ovs: &Ovs, flows: &[&str]) {
    for flow in flows {
        ovs.ofctl("add-flow", &[flow]);
    }
}

/// What flows the switch has, in its own words.
fn flows(ovs: &Ovs) -> BTreeSet<String> {
    let dump = ovs.ofctl("dump-flows", &["--no-stats", "--no-names"]);
    let flows = dump.lines().filter(|line| line.contains("actions="));
    flows.map(|flow| flow.trim().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_shuts_a_port_is_found_and_removed_and_nothing_else() {
    let ovs = waiting();
    let all = flows(&ovs);
    assert_eq!(all.len(), WAITING.len());
    for version in ["13", "14", "15"] {
        ovs.vsctl(&format!("set bridge br-int protocols=OpenFlow{version}"));
        let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
        assert_eq!(switch.version().to_string().replace('.', ""), version);
        let blocks = soon(switch.blocks(7)).await.unwrap();
        assert_eq!(blocks.len(), 2, "OpenFlow {version}: {blocks:?}");
        // One that is open, and one that is not there.
        assert_eq!(soon(switch.blocks(8)).await.unwrap(), []);
        assert_eq!(soon(switch.blocks(9)).await.unwrap(), []);
        assert_eq!(flows(&ovs), all, "to ask changes nothing");
        soon(switch.remove(&blocks).unwrap().processed())
            .await
            .unwrap();
        let left = flows(&ovs);
        let removed: Vec<_> = all.difference(&left).collect();
        assert_eq!(removed, SHUTTING, "OpenFlow {version}");
        assert!(left.is_subset(&all), "OpenFlow {version}: {left:?}");
        assert_eq!(soon(switch.blocks(7)).await.unwrap(), []);
        // As when ovn-controller was first: nobody minds.
        soon(switch.remove(&blocks).unwrap().processed())
            .await
            .unwrap();
        assert_eq!(flows(&ovs), left);
        // For the next, and each of them is found alone, too.
        add(&ovs, &WAITING[1..2]);
        assert_eq!(soon(switch.blocks(7)).await.unwrap().len(), 1);
        add(&ovs, &WAITING);
        assert_eq!(soon(switch.blocks(7)).await.unwrap().len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn before_1_3_nothing_is_found_and_nothing_removed() {
    let ovs = waiting();
    let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
    let blocks = soon(switch.blocks(7)).await.unwrap();
    assert_eq!(blocks.len(), 2);
    let before = flows(&ovs);
    for version in ["10", "11", "12"] {
        ovs.vsctl(&format!("set bridge br-int protocols=OpenFlow{version}"));
        let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
        assert_eq!(switch.version().to_string().replace('.', ""), version);
        assert_eq!(soon(switch.blocks(7)).await.unwrap(), []);
        // Found when the bridge still spoke another version.
        soon(switch.remove(&blocks).unwrap().processed())
            .await
            .unwrap();
        soon(switch.barrier()).await.unwrap();
        assert!(switch.is_alive());
        assert_eq!(flows(&ovs), before, "OpenFlow {version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_become_another_flow_meanwhile_stays() {
    let ovs = waiting();
    for version in ["13", "14", "15"] {
        ovs.vsctl(&format!("set bridge br-int protocols=OpenFlow{version}"));
        let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
        let blocks = soon(switch.blocks(7)).await.unwrap();
        assert_eq!(blocks.len(), 2);
        // The same match and priority, and somebody else's now.
        let others = [
            "cookie=0xbeef,priority=1000,in_port=7,actions=resubmit(,8)",
            "table=65,cookie=0xbeef,priority=1000,metadata=0x1,reg15=0x2,actions=output:8",
        ];
        add(&ovs, &others);
        let before = flows(&ovs);
        assert_eq!(before.len(), WAITING.len(), "in place of the two");
        soon(switch.remove(&blocks).unwrap().processed())
            .await
            .unwrap();
        assert_eq!(flows(&ovs), before, "OpenFlow {version}");
        assert_eq!(soon(switch.blocks(7)).await.unwrap(), []);
        add(&ovs, &WAITING);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_be_longer_than_a_message() {
    let ovs = waiting();
    // As many flows of the port's binding as fit in no one message.
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for number in 0..3000 {
        let flow = format!("cookie=0xc0dec0de,table=70,priority=50,metadata={number},actions=drop");
        writeln!(file, "{flow}").unwrap();
    }
    ovs.ofctl("add-flows", &[file.path().to_str().unwrap()]);
    for version in ["13", "14", "15"] {
        ovs.vsctl(&format!("set bridge br-int protocols=OpenFlow{version}"));
        let switch = soon(Switch::connect(&ovs.management())).await.unwrap();
        let blocks = soon(switch.blocks(7)).await.unwrap();
        assert_eq!(blocks.len(), 2, "OpenFlow {version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_opens_when_what_shuts_it_is_removed() {
    let ovs = waiting();
    ovs.ofctl("add-flow", &["priority=100,in_port=7,actions=resubmit(,8)"]);
    let keeper = Keeper::start(ovs.management(), |_| {});
    keeper.expect_to_open([7].into());
    let opening = PacketOuts::opening([(7, MAC)]).unwrap();
    until("it is known what shuts the port", || {
        keeper.blocks(&opening).is_some()
    });
    let switch = keeper.switch().unwrap();
    let mut frame = PacketOuts::new();
    frame.push(7, vec![0; 60]).unwrap();
    let sent = switch.send(&frame).unwrap();
    soon(sent.processed()).await.unwrap();
    assert_eq!(ovs.packets("priority=1000,in_port=7"), 1);
    let blocks = keeper.blocks(&opening).unwrap();
    assert_eq!(blocks.len(), 2);
    soon(switch.remove(&blocks).unwrap().processed())
        .await
        .unwrap();
    let sent = switch.send(&frame).unwrap();
    soon(sent.processed()).await.unwrap();
    assert_eq!(ovs.packets("priority=100,in_port=7"), 1);
    // The announcement still finds its way to OVN.
    soon(keeper.send(&opening).unwrap().processed())
        .await
        .unwrap();
    assert_eq!(ovs.packets("priority=1010"), 1);
    // It is noticed that nothing shuts the port any more.
    until("nothing shuts the port", || {
        keeper.blocks(&opening).is_none()
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_to_be_open_is_told_of_whenever_it_is_shut_again() {
    let ovs = waiting();
    let (tells, mut blocked) = tokio::sync::mpsc::unbounded_channel();
    let keeper = Keeper::start(ovs.management(), move |ports| {
        let _ = tells.send(ports);
    });
    keeper.expect_to_open([7, 8].into());
    keeper.expect_open([7, 8].into());
    let opening = PacketOuts::opening([(7, MAC)]).unwrap();
    for restart in 0..3 {
        let found = soon(blocked.recv()).await.unwrap();
        assert_eq!(found, [7].into(), "restart {restart}");
        let blocks = keeper.blocks_to_remove(&opening).unwrap();
        let switch = keeper.switch().unwrap();
        soon(switch.remove(&blocks).unwrap().processed())
            .await
            .unwrap();
        until("nothing shuts the port", || {
            keeper.blocks(&opening).is_none()
        });
        while blocked.try_recv().is_ok() {}
        // As an ovn-controller does that starts anew and does not know that the port is active.
        ovs.ofctl("del-flows", &[]);
        // By the flow of table 0 the others are found.
        add(&ovs, &[WAITING[2], WAITING[1]]);
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
    let mut packets = PacketOuts::new();
    let frame = node_hooks::openflow::rarp(MAC).to_vec();
    packets.push(0xfeff, frame).unwrap();
    soon(switch.send(&packets).unwrap().processed())
        .await
        .unwrap();
    assert!(matches!(
        packets.push(0xff00, Vec::new()),
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
    let keeper = Keeper::start(ovs.management(), |_| {});
    let mut state = keeper.state();
    soon(state.wait_for(|state| matches!(state, State::Warm(_))))
        .await
        .unwrap();
    ovs.kill_switch();
    soon(state.wait_for(|state| matches!(state, State::Cold { .. })))
        .await
        .unwrap();
    let opening = PacketOuts::opening([(7, MAC)]).unwrap();
    ovs.start_switch();
    // As ovn-controller does when the bridge is back.
    ovs.vsctl("set bridge br-int fail-mode=secure");
    soon(state.wait_for(|state| matches!(state, State::Warm(_))))
        .await
        .unwrap();
    let sent = keeper.send(&opening).unwrap();
    soon(sent.processed()).await.unwrap();
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
