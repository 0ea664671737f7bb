//! The whole agent: with Open vSwitch itself, a script in virsh's place, and a controller that says what the test says.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

#[path = "../support/controller.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod controller;
mod guest;
#[path = "../ovs/support.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod ovs;
#[path = "../support/pki.rs"]
mod pki;

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use controller::{Attachment, Controller, SOON};
use hyper_util::rt::TokioIo;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use node_hooks::{Agent, Cli};
use node_hooks_api::agent::gate_answer::Verdict;
use node_hooks_api::agent::reopened::Reason;
use node_hooks_api::agent::signal::{Kind, Source};
use node_hooks_api::agent::{
    Announce, Arm, Disarm, Forgery, GateAnswer, HandoverId, Open, Outcome, Port, PortReport, Side,
    Signal, from_agent, outcome, to_agent,
};
use node_hooks_api::kubevirt::ExecuteNodeHookRequest;
use node_hooks_api::kubevirt::node_hook_service_client::NodeHookServiceClient;
use ovs::Ovs;
use pki::{CONTROLLER, Pki};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

const MAC: &str = "52:54:00:00:00:01";
/// A third of how long the test may say nothing while it has the switch do something.
const HEARTBEAT_MS: u32 = 10_000;
/// The agent looks at a port that is to be open ten times a second: what has not come by then does not come.
const STEADY: Duration = Duration::from_millis(500);

/// A node with its agent, and the controller's end of its stream.
struct Node {
    ovs: Ovs,
    controller: Controller,
    directory: TempDir,
    listen: SocketAddr,
    stop: CancellationToken,
    agent: JoinHandle<anyhow::Result<()>>,
    _tls: TempDir,
}

impl Node {
    async fn start() -> (Self, Attachment) {
        let ovs = Ovs::switch();
        let pki = Pki::new();
        let mut controller = Controller::start(pki.server(CONTROLLER), true).await;
        let (directory, tls) = (tempfile::tempdir().unwrap(), pki.agent("node1"));
        let virsh = fake_virsh(&directory);
        let cli = Cli::parse_from([
            "node-hooks",
            "--node=node1",
            &format!("--controller={}", controller.address),
            &format!("--tls-dir={}", tls.path().display()),
            &format!("--ovs={}", ovs.remote()),
            &format!("--bridge-socket={}", ovs.management().display()),
            "--libvirt-sockets=",
            "--libvirt-uri=test:///default",
            &format!("--virsh={}", virsh.display()),
            &format!("--hook-socket={}/hook.sock", directory.path().display()),
            "--hook-on-timeout=fail",
            "--listen=127.0.0.1:0",
        ]);
        let stop = CancellationToken::new();
        let agent = Agent::new(cli).await.unwrap();
        let listen = agent.address().unwrap();
        let agent = tokio::spawn(agent.run(stop.clone()));
        let (attachment, _) = controller.welcome(HEARTBEAT_MS).await;
        let node = Self {
            ovs,
            controller,
            directory,
            listen,
            stop,
            agent,
            _tls: tls,
        };
        (node, attachment)
    }

    /// Has the hypervisor say something of the VM's domain.
    async fn libvirt(&self, words: &str) {
        let line = format!(
            "2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain 'demo_web': {words}\n"
        );
        let events = self.directory.path().join("events");
        // Opens once the script listens.
        let write = move || {
            File::options()
                .write(true)
                .open(events)?
                .write_all(line.as_bytes())
        };
        let written = tokio::task::spawn_blocking(write);
        timeout(SOON, written).await.unwrap().unwrap().unwrap();
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.listen).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(SOON, self.agent).await.unwrap().unwrap().unwrap();
        assert!(!self.directory.path().join("hook.sock").exists());
    }
}

/// Says a host's name, and then what is written into the pipe beside it.
fn fake_virsh(directory: &TempDir) -> PathBuf {
    let (virsh, events) = (
        directory.path().join("virsh"),
        directory.path().join("events"),
    );
    mkfifo(&events, Mode::S_IRWXU).unwrap();
    // Open for writing, too: so the pipe has no end between two events.
    let script = format!(
        "#!/bin/sh\necho host-7\nexec cat <>'{}'\n",
        events.display()
    );
    fs::write(&virsh, script).unwrap();
    fs::set_permissions(&virsh, Permissions::from_mode(0o755)).unwrap();
    virsh
}

fn id() -> HandoverId {
    HandoverId {
        namespace: "demo".into(),
        vm: "web".into(),
        migration_uid: "m-1".into(),
        epoch: 7,
    }
}

fn arm(side: Side) -> to_agent::Message {
    to_agent::Message::Arm(Arm {
        id: Some(id()),
        side: side.into(),
        ports: vec![Port {
            name: "web.demo".into(),
            mac: MAC.into(),
            addresses: vec!["10.0.0.1".into()],
        }],
        ..Arm::default()
    })
}

fn open(command: u64) -> to_agent::Message {
    to_agent::Message::Open(Open {
        id: Some(id()),
        command,
        ..Open::default()
    })
}

async fn next_signal(attachment: &mut Attachment) -> Signal {
    loop {
        if let from_agent::Message::Signal(signal) = attachment.next_word().await.unwrap() {
            return signal;
        }
    }
}

async fn next_outcome(attachment: &mut Attachment) -> Outcome {
    loop {
        if let from_agent::Message::Outcome(outcome) = attachment.next_word().await.unwrap() {
            return outcome;
        }
    }
}

async fn next_report(attachment: &mut Attachment) -> PortReport {
    loop {
        if let from_agent::Message::Port(report) = attachment.next_word().await.unwrap() {
            return report;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_target_opens_when_it_is_told_and_no_sooner() {
    let (node, mut attachment) = Node::start().await;
    let rarp = format!("priority=10,rarp,in_port=7,dl_src={MAC}");
    node.ovs
        .ofctl("add-flow", &[&format!("{rarp},actions=drop")]);
    attachment.say(open(1)).await;
    let unarmed = next_outcome(&mut attachment).await;
    assert_eq!(unarmed.result(), outcome::Result::Unknown);
    attachment.say(arm(Side::Target)).await;
    assert!(!next_report(&mut attachment).await.present);
    attachment.say(open(2)).await;
    let early = next_outcome(&mut attachment).await;
    assert_eq!(early.result(), outcome::Result::Failed);
    assert!(early.reason.contains("web.demo"), "{}", early.reason);
    node.ovs.vsctl(
        "add-port br-int tap0 -- set interface tap0 type=dummy ofport_request=7 external_ids:iface-id=web.demo",
    );
    while !next_report(&mut attachment).await.present {}
    // The number comes after the interface.
    let opened = loop {
        attachment.say(open(3)).await;
        let outcome = next_outcome(&mut attachment).await;
        if outcome.result() == outcome::Result::Done {
            break outcome;
        }
        assert_eq!(outcome.result(), outcome::Result::Failed, "{outcome:?}");
    };
    let hops = opened.hops.unwrap();
    assert!(0 < hops.received_at_ns && hops.received_at_ns <= hops.sent_at_ns);
    assert!(hops.sent_at_ns <= hops.processed_at_ns);
    assert_eq!(node.ovs.packets("rarp,"), 1);
    // Once is enough.
    attachment.say(open(4)).await;
    let again = next_outcome(&mut attachment).await;
    assert_eq!((again.command, again.hops), (4, Some(hops)));
    assert_eq!(node.ovs.packets("rarp,"), 1);
    let metrics = node.get("/metrics").await;
    for line in [
        "segue_agent_open_written_seconds_count 1",
        "segue_agent_armed 1",
        "segue_agent_switch_connected 1",
        "segue_agent_controller_connected 1",
        "segue_agent_hypervisors 1",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}\n{metrics}"
        );
    }
    node.stop().await;
}

/// What ovn-controller blocks a port with until it is activated, and what it gets the announcement by. By the last of
/// them it is found that a port is blocked.
const BLOCKING: [&str; 3] = [
    "cookie=0xc0dec0de,priority=1010,in_port=7,dl_type=0x8035,actions=drop",
    "table=65,cookie=0xc0dec0de,priority=1000,metadata=0x1,reg15=0x2,actions=drop",
    "cookie=0xc0dec0de,priority=1000,in_port=7,actions=drop",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_that_ovn_undoes_is_done_again_until_the_handover_is_over() {
    let (node, mut attachment) = Node::start().await;
    let block = || {
        for flow in BLOCKING {
            node.ovs.ofctl("add-flow", &[flow]);
        }
    };
    let is_blocked = || node.ovs.ofctl("dump-flows", &[]).contains("priority=1000");
    node.ovs.vsctl(
        "add-port br-int tap0 -- set interface tap0 type=dummy ofport_request=7 external_ids:iface-id=web.demo",
    );
    attachment.say(arm(Side::Target)).await;
    let opened = loop {
        attachment.say(open(1)).await;
        let outcome = next_outcome(&mut attachment).await;
        if outcome.result() == outcome::Result::Done {
            break outcome;
        }
    };
    assert!(opened.reason.is_empty(), "{opened:?}");
    // ovn-controller starts anew, and was never told.
    for times in 1..=2 {
        block();
        let reopened = loop {
            let report = next_report(&mut attachment).await;
            if let Some(reopened) = report.reopened.filter(|reopened| reopened.times == times) {
                break reopened;
            }
        };
        assert_eq!(reopened.reason(), Reason::Undone);
        assert!(reopened.at_ns > opened.hops.unwrap().processed_at_ns);
        assert!(!is_blocked());
    }
    let metrics = node.get("/metrics").await;
    for line in [
        "segue_agent_reopenings_total{reason=\"undone\"} 2",
        "segue_agent_open_written_seconds_count 1",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}\n{metrics}"
        );
    }
    let disarm = Disarm {
        id: Some(id()),
        stays: false,
    };
    attachment.say(to_agent::Message::Disarm(disarm)).await;
    // It is carried out when the next command is.
    attachment.say(open(2)).await;
    let outcome = next_outcome(&mut attachment).await;
    assert_eq!(outcome.result(), outcome::Result::Unknown);
    block();
    tokio::time::sleep(STEADY).await;
    assert!(is_blocked(), "nobody opens what is not armed");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pause_is_told_also_to_a_controller_that_comes_later() {
    let (mut node, mut attachment) = Node::start().await;
    attachment.say(arm(Side::Source)).await;
    next_report(&mut attachment).await;
    node.libvirt("Suspended Migrated").await;
    let paused = next_signal(&mut attachment).await;
    assert_eq!(
        (paused.kind(), paused.source()),
        (Kind::Paused, Source::Libvirt)
    );
    assert!(paused.at_ns > 0 && paused.at_ns <= paused.seen_at_ns);
    drop(attachment);
    let (mut attachment, _) = node.controller.welcome(HEARTBEAT_MS).await;
    attachment.say(arm(Side::Source)).await;
    assert_eq!(next_signal(&mut attachment).await, paused);
    node.libvirt("Resumed Migrated").await;
    let resumed = next_signal(&mut attachment).await;
    assert_eq!(
        (resumed.kind(), resumed.source()),
        (Kind::Resumed, Source::Libvirt)
    );
    let disarm = Disarm {
        id: Some(id()),
        stays: true,
    };
    attachment.say(to_agent::Message::Disarm(disarm)).await;
    let ready = node.get("/readyz").await;
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.contains("9.9.9"),
        "{ready}"
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_goes_on_at_the_source_is_announced_through_the_switch() {
    let (node, mut attachment) = Node::start().await;
    let rarp = format!("priority=10,rarp,in_port=7,dl_src={MAC}");
    node.ovs
        .ofctl("add-flow", &[&format!("{rarp},actions=drop")]);
    node.ovs.vsctl(
        "add-port br-int tap0 -- set interface tap0 type=dummy ofport_request=7 external_ids:iface-id=web.demo",
    );
    attachment.say(arm(Side::Source)).await;
    // The switch's number for it is known once an announcement can be commanded.
    loop {
        let announce = Announce {
            id: Some(id()),
            command: 1,
        };
        attachment.say(to_agent::Message::Announce(announce)).await;
        if next_outcome(&mut attachment).await.result() == outcome::Result::Done {
            break;
        }
    }
    let commanded = node.ovs.packets("rarp,");
    assert_eq!(
        commanded, 1,
        "switches learn by it, whatever addresses there are"
    );
    node.libvirt("Suspended Migrated").await;
    assert_eq!(next_signal(&mut attachment).await.kind(), Kind::Paused);
    node.libvirt("Resumed Migrated").await;
    assert_eq!(next_signal(&mut attachment).await.kind(), Kind::Resumed);
    ovs::until("the guest is announced, without a command", || {
        node.ovs.packets("rarp,") == commanded + 1
    });
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_waits_for_the_controllers_word() {
    let (node, mut attachment) = Node::start().await;
    let path = node.directory.path().join("hook.sock");
    let vmi = r#"{"metadata":{"namespace":"demo","name":"web","uid":"u-1"}}"#;
    let request = ExecuteNodeHookRequest {
        hook_point: "PreMigrationSource".into(),
        vmi: vmi.into(),
        node_context: None,
    };
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(connector).await.unwrap();
    let mut client = NodeHookServiceClient::new(channel);
    let call = tokio::spawn(async move { client.execute_node_hook(request).await });
    let Some(from_agent::Message::GateQuestion(question)) = attachment.next_word().await else {
        panic!("a question was expected");
    };
    assert_eq!(
        (question.vm.as_str(), question.vmi_uid.as_str()),
        ("web", "u-1")
    );
    assert!(!call.is_finished());
    attachment
        .say(to_agent::Message::GateAnswer(GateAnswer {
            question: question.question,
            verdict: Verdict::Go.into(),
            reason: "ready".into(),
        }))
        .await;
    timeout(SOON, call).await.unwrap().unwrap().unwrap();
    node.stop().await;
}
