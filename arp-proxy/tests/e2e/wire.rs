//! What the kernel of a guest makes of the answers.

use std::net::IpAddr;

use arp_proxy::answer::Tag;
use arp_proxy::{Gateway, Mac, announce_once};

use crate::station::{self, Station};
use crate::support::{Lab, MAC, ip, send, until, within};

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_guest_finds_its_gateway() {
    let lab = Lab::linked();
    lab.route("eth0");
    let proxy = lab.start(&["--interface", "tap*"], &["tap0"]);
    lab.resolve("eth0");
    assert!(proxy.metric("arp_proxy_answers_total{kind=\"arp\"}") > 0);
    assert!(proxy.metric("arp_proxy_answers_total{kind=\"neighbour_solicitation\"}") > 0);
}

/// With raw frames, as not every kernel has VLAN interfaces; every kernel takes the outer tag off.
#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_question_in_a_vlan_is_answered_in_it() {
    let lab = Lab::linked();
    let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    let station = Station::open(&lab.guest, "eth0");
    let asker: Mac = "02:00:00:00:00:10".parse().unwrap();
    let customer = |id| Tag::vlan(id).unwrap();
    let provider = Tag {
        tpid: 0x88a8,
        tci: 0x6007,
    };
    for tags in [
        &[][..],
        &[customer(100)],
        &[customer(4094)],
        &[provider, customer(9)],
    ] {
        let question = station::arp_request(asker, [10, 0, 0, 1], tags);
        station.send(&question);
        let answer = station.receive(|frame| frame.is_to(asker));
        assert_eq!(answer.tags(), tags);
        let payload = answer.payload();
        // A reply, by the gateway.
        assert_eq!(payload[6..8], [0, 2]);
        assert_eq!(payload[8..14], Gateway::DEFAULT_MAC.octets());
        assert_eq!(payload[14..18], [169, 254, 1, 1]);
    }
    assert_eq!(proxy.metric("arp_proxy_answers_total{kind=\"arp\"}"), 4);
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn an_announcement_goes_to_the_vlan_that_was_named() {
    let lab = Lab::linked();
    let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    let station = Station::open(&lab.guest, "eth0");
    let answer = proxy.ask("POST", "/announce?interface=tap0&vlan=100");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let heard = station.receive(|frame| frame.is_to(Mac::broadcast()));
    assert_eq!(heard.tags(), [Tag::vlan(100).unwrap()]);
    assert_eq!(heard.payload()[14..18], [169, 254, 1, 1]);
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_source_that_asks_too_often_is_left_waiting_and_the_others_are_not() {
    let lab = Lab::linked();
    let arguments = ["--interface=tap0", "--rate=1", "--burst=3"];
    let proxy = lab.start(&arguments, &["tap0"]);
    let station = Station::open(&lab.guest, "eth0");
    let mac = |last| arp_proxy::Mac::new(2, 0, 0, 0, 0, last);
    for _ in 0..50 {
        station.send(&station::arp_request(mac(1), [10, 0, 0, 1], &[]));
    }
    station.send(&station::arp_request(mac(2), [10, 0, 0, 2], &[]));
    station.receive(|frame| frame.is_to(mac(2)));
    assert_eq!(proxy.metric("arp_proxy_requests_total{kind=\"arp\"}"), 51);
    // Three at once, and one more for each second that the fifty took.
    let limited = proxy.metric("arp_proxy_rate_limited_total{kind=\"arp\"}");
    assert!((30..=47).contains(&limited), "{limited}");
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_guest_cannot_take_the_gateways_address() {
    let lab = Lab::linked();
    let _proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    ip(&[
        "-6",
        "-n",
        &lab.guest,
        "addr",
        "add",
        "fe80::1/64",
        "dev",
        "eth0",
    ]);
    until("duplicate address detection finds the gateway", || {
        ip(&["-6", "-n", &lab.guest, "addr", "show", "dev", "eth0"]).contains("dadfailed")
    });
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_guest_that_looks_for_routers_finds_one() {
    let lab = Lab::linked();
    let arguments = [
        "--interface=tap0",
        "--router-advertisements",
        "--router-lifetime=900",
        "--prefix=2001:db8:0:1::/64",
    ];
    let _proxy = lab.start(&arguments, &["tap0"]);
    // Down and up, so that it solicits with the proxy there.
    ip(&["-n", &lab.guest, "link", "set", "eth0", "down"]);
    ip(&["-n", &lab.guest, "link", "set", "eth0", "up"]);
    until("the guest has a default router and an address", || {
        let route = ip(&["-6", "-n", &lab.guest, "route", "show", "default"]);
        let addresses = ip(&["-6", "-n", &lab.guest, "addr", "show", "dev", "eth0"]);
        route.contains("via fe80::1 dev eth0 proto ra") && addresses.contains("2001:db8:0:1:")
    });
    let on_link = ip(&["-6", "-n", &lab.guest, "route", "show", "2001:db8:0:1::/64"]);
    assert_eq!(on_link, "", "the prefix is not on-link");
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn an_announcement_corrects_what_a_guest_knew() {
    let lab = Lab::linked();
    lab.route("eth0");
    let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    for gateway in ["169.254.1.1", "fe80::1"] {
        ip(&[
            "-n",
            &lab.guest,
            "neigh",
            "replace",
            gateway,
            "lladdr",
            "02:00:00:00:00:99",
            "dev",
            "eth0",
            "nud",
            "stale",
        ]);
    }
    let answer = proxy.ask("POST", "/announce?interface=tap0");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for gateway in ["169.254.1.1", "fe80::1"] {
        until("the guest has heard the announcement", || {
            lab.neighbour("eth0", gateway).contains(MAC)
        });
    }
    assert_eq!(proxy.metric("arp_proxy_announcements_total"), 1);
    let answer = proxy.ask("POST", "/announce?interface=tap7");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(answer.contains("tap7"), "{answer}");
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn what_this_host_sends_is_nobodys_question() {
    let lab = Lab::linked();
    lab.route("eth0");
    // The host looks for the gateway too, behind the same interface.
    ip(&[
        "-n",
        &lab.host,
        "addr",
        "add",
        "10.20.1.9/24",
        "dev",
        "tap0",
    ]);
    ip(&[
        "-n",
        &lab.host,
        "route",
        "add",
        "169.254.1.1",
        "dev",
        "tap0",
    ]);
    let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    send(&lab.host, IpAddr::from([169, 254, 1, 1]));
    // Frames are taken in order: with the guest answered, the host's have been passed over.
    lab.resolve("eth0");
    let known = ip(&["-n", &lab.host, "neigh", "show", "169.254.1.1"]);
    assert!(!known.contains(MAC), "{known}");
    assert_eq!(proxy.metric("arp_proxy_ignored_total{reason=\"own\"}"), 0);
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_rival_is_counted_and_not_answered() {
    let lab = Lab::linked();
    let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    let addresses = [Gateway::DEFAULT_IPV4.into(), Gateway::DEFAULT_IPV6.into()];
    let rival: Mac = "02:00:00:00:00:99".parse().unwrap();
    let rival = Gateway::new(rival, addresses).unwrap();
    within(&lab.guest, || announce_once(&rival, "eth0", None)).unwrap();
    // A gratuitous request, a gratuitous reply, an advertisement.
    until("three claims are counted", || {
        proxy.metric("arp_proxy_conflicts_total") == 3
    });
    assert_eq!(proxy.metric("arp_proxy_answers_total{kind=\"arp\"}"), 0);
}
