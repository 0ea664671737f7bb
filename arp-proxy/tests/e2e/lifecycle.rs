//! Interfaces that come and go, and what is left of the proxy when it is gone.

use nix::sys::signal::Signal;

use crate::support::{Lab, ip};

/// Where questions for fe80::1 go, which the host's own addresses have no use for.
const GROUP: &str = "33:33:ff:00:00:01";

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn interfaces_come_and_go() {
    let lab = Lab::new();
    let proxy = lab.start(&["--interface", "tap*"], &[]);
    for _ in 0..2 {
        lab.link("tap0");
        proxy.watches(&["tap0"]);
        lab.route("eth0");
        lab.resolve("eth0");
        ip(&["-n", &lab.host, "link", "del", "tap0"]);
        proxy.watches(&[]);
    }
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn only_the_wanted_are_watched_whatever_they_were_called() {
    let lab = Lab::linked();
    let proxy = lab.start(&["--interface", "vm*"], &[]);
    let rename = |from, to| {
        ip(&["-n", &lab.host, "link", "set", from, "down"]);
        ip(&["-n", &lab.host, "link", "set", from, "name", to]);
        ip(&["-n", &lab.host, "link", "set", to, "up"]);
    };
    rename("tap0", "vm0");
    proxy.watches(&["vm0"]);
    rename("vm0", "vm1");
    proxy.watches(&["vm1"]);
    lab.route("eth0");
    lab.resolve("eth0");
    rename("vm1", "tap0");
    proxy.watches(&[]);
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn an_interface_that_was_down_is_answered_on_again() {
    let lab = Lab::linked();
    let _proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    ip(&["-n", &lab.host, "link", "set", "tap0", "down"]);
    ip(&["-n", &lab.host, "link", "set", "tap0", "up"]);
    lab.route("eth0");
    lab.resolve("eth0");
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn another_namespaces_interface_is_let_go() {
    let lab = Lab::linked();
    let proxy = lab.start(&["--interface", "tap*"], &["tap0"]);
    ip(&["-n", &lab.host, "link", "set", "tap0", "netns", &lab.guest]);
    proxy.watches(&[]);
}

#[test]
#[ignore = "needs root: cargo test -p arp-proxy --test e2e -- --ignored"]
fn nothing_is_left_behind_however_it_ends() {
    let lab = Lab::linked();
    let promiscuous = || ip(&["-n", &lab.host, "-d", "link", "show", "tap0"]);
    let groups = || ip(&["-n", &lab.host, "maddr", "show", "dev", "tap0"]);
    assert!(!groups().contains(GROUP));
    for (signal, code) in [(Signal::SIGTERM, Some(0)), (Signal::SIGINT, Some(0))] {
        let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
        assert!(promiscuous().contains("promiscuity 0"));
        assert!(groups().contains(GROUP), "{}", groups());
        assert_eq!(proxy.end(signal), code);
        assert!(promiscuous().contains("promiscuity 0"));
        assert!(!groups().contains(GROUP), "{}", groups());
    }
    // Killed without a chance to say anything: the kernel cleans up, and the next one replaces the control socket.
    drop(lab.start(&["--interface", "tap0"], &["tap0"]));
    assert!(promiscuous().contains("promiscuity 0"));
    assert!(!groups().contains(GROUP), "{}", groups());
}
