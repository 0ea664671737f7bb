//! A guest's frames, on a link of its own: the agent and all that it uses are in a network namespace of the test's.

use std::net::IpAddr;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use node_hooks::openflow::rarp;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::*;

/// The host's end of the pod's cable, and the pod's.
const HOST_END: &str = "tap0";
const POD_END: &str = "pod0";

/// Runs on threads that are in a network namespace that nobody else is in; it goes with them. Takes root.
fn alone<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            ip(&format!(
                "link add {HOST_END} type veth peer name {POD_END} address {MAC}"
            ));
            for end in [HOST_END, POD_END] {
                ip(&format!("link set {end} up"));
            }
            // Its threads are made by this one, and are where it is.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test());
        });
        inside.join().unwrap();
    });
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

/// Sends a frame out of the pod.
fn send(frame: &[u8]) {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).unwrap();
    let index = nix::net::if_::if_nametoindex(POD_END).unwrap();
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is one of the platform's sockaddr types, and fits.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_ifindex = i32::try_from(index).unwrap();
    let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the storage holds a sockaddr_ll of that length.
    let address = unsafe { SockAddr::new(storage, length) };
    socket.bind(&address).unwrap();
    socket.send(frame).unwrap();
}

async fn next_forgery(attachment: &mut Attachment) -> Forgery {
    loop {
        if let from_agent::Message::Forgery(forgery) = attachment.next_word().await.unwrap() {
            return forgery;
        }
    }
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test agent -- --ignored"]
fn a_guest_on_a_blocked_port_is_let_out_and_its_pods_announcement_is_not() {
    alone(|| async {
        let (node, mut attachment) = Node::start().await;
        let is_blocked = || node.ovs.ofctl("dump-flows", &[]).contains("priority=1000");
        for flow in BLOCKING {
            node.ovs.ofctl("add-flow", &[flow]);
        }
        node.ovs.vsctl(&format!(
            "add-port br-int {HOST_END} -- set interface {HOST_END} type=dummy ofport_request=7 \
             external_ids:iface-id=web.demo"
        ));
        attachment.say(arm(Side::Target)).await;
        // As a CNI does for the pod that it has made. The agent may not listen yet.
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let announce = || node_hooks::announce::on_uplink(POD_END, &[address]).unwrap();
        let forgery = loop {
            announce();
            let next = next_forgery(&mut attachment);
            if let Ok(forgery) = timeout(STEADY, next).await {
                break forgery;
            }
        };
        assert_eq!(forgery.port, "web.demo");
        assert!(forgery.reason.contains("pod"), "{}", forgery.reason);
        tokio::time::sleep(STEADY).await;
        assert!(is_blocked(), "the guest does not run here yet");
        // As QEMU does when the guest has come; and no ovn-controller is there to hear it.
        send(&rarp(MAC.parse().unwrap()));
        let resumed = next_signal(&mut attachment).await;
        assert_eq!(
            (resumed.kind(), resumed.source()),
            (Kind::Resumed, Source::Rarp)
        );
        let reopened = loop {
            if let Some(reopened) = next_report(&mut attachment).await.reopened {
                break reopened;
            }
        };
        assert_eq!((reopened.times, reopened.reason()), (1, Reason::GuestRuns));
        assert!(!is_blocked());
        // From now on what the port sends is the guest's.
        announce();
        while next_signal(&mut attachment).await.source() != Source::Garp {}
        node.stop().await;
    });
}
