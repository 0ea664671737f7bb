//! What the kernel makes of it.

use std::net::IpAddr;

use node_hooks::announce;
use node_hooks::routes::{Error, Removed, Routes};

use crate::support::{Lab, ip, until, within};

fn addresses<const N: usize>(texts: [&str; N]) -> [IpAddr; N] {
    texts.map(|text| text.parse().unwrap())
}

fn vm() -> [IpAddr; 2] {
    addresses(["10.20.1.10", "2001:db8::10"])
}

fn uplinked() -> Routes {
    Routes::with_uplinks(vec!["up0".to_owned()])
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn a_vm_is_routed_to_and_answered_for_in_both_families() {
    let lab = Lab::new();
    let routes = uplinked();
    for _ in 0..2 {
        lab.run(routes.put(&vm(), "tap0")).unwrap();
        assert_eq!(lab.routes("-4"), ["10.20.1.10 dev tap0 scope link"]);
        let six = lab.routes("-6");
        assert_eq!(six.len(), 1, "{six:?}");
        assert!(six[0].starts_with("2001:db8::10 dev tap0 "), "{six:?}");
        let proxies = lab.proxies();
        for address in ["10.20.1.10 dev up0", "2001:db8::10 dev up0"] {
            assert_eq!(proxies.matches(address).count(), 1, "{proxies}");
        }
        assert_eq!(proxies.matches("proto 115").count(), 2, "{proxies}");
    }
    let removed = lab.run(routes.remove(&vm())).unwrap();
    assert_eq!(
        removed,
        Removed {
            routes: 2,
            proxies: 2
        }
    );
    assert_eq!(lab.routes("-4"), [""; 0]);
    assert_eq!(lab.routes("-6"), [""; 0]);
    assert_eq!(lab.proxies(), "");
    assert_eq!(lab.run(routes.remove(&vm())).unwrap(), Removed::default());
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn a_vm_that_moves_between_interfaces_has_one_route_throughout() {
    let lab = Lab::new();
    let routes = uplinked();
    let [four, _] = vm();
    for interface in ["tap0", "tap1", "tap0"] {
        lab.run(routes.put(&vm(), interface)).unwrap();
        assert_eq!(
            lab.routes("-4"),
            [format!("{four} dev {interface} scope link")]
        );
        let six = lab.routes("-6");
        assert_eq!(six.len(), 1, "{six:?}");
        assert!(six[0].contains(interface), "{six:?}");
    }
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn what_a_crash_left_goes_and_what_others_wrote_stays() {
    let lab = Lab::new();
    lab.ip("route add 10.20.1.20 dev tap1 proto bird");
    lab.ip("-6 route add 2001:db8::20 dev tap1 proto static");
    lab.ip("route add 10.20.1.11 dev tap1 proto 115 table 77");
    lab.ip("route add 10.20.2.0/24 dev tap1 proto 115");
    lab.ip("neigh add proxy 10.20.1.20 dev up0");
    lab.ip("-6 neigh add proxy 2001:db8::20 dev up0");
    let theirs = |lab: &Lab| {
        lab.ip("route show table all") + &lab.ip("-6 route show table all") + &lab.proxies()
    };
    let before = theirs(&lab);
    let stays = addresses(["10.20.1.12"]);
    let crashed = uplinked();
    lab.run(crashed.put(&vm(), "tap0")).unwrap();
    lab.run(crashed.put(&addresses(["10.20.1.11"]), "tap1"))
        .unwrap();
    lab.run(crashed.put(&stays, "tap0")).unwrap();
    drop(crashed);
    // Guests leave, and their routes go as with an interface.
    lab.ip("route del 10.20.1.11 dev tap1 proto 115");
    lab.ip("route del 10.20.1.10 dev tap0 proto 115");
    lab.ip("-6 route del 2001:db8::10 dev tap0 proto 115");
    let routes = uplinked();
    let removed = lab.run(routes.sweep()).unwrap();
    assert_eq!(
        removed,
        Removed {
            routes: 0,
            proxies: 3
        }
    );
    assert!(
        lab.routes("-4")
            .contains(&"10.20.1.12 dev tap0 scope link".to_owned())
    );
    assert!(lab.proxies().contains("10.20.1.12 dev up0"));
    lab.run(routes.remove(&stays)).unwrap();
    assert_eq!(theirs(&lab), before);
    // Even if it is asked for what is others'.
    let theirs_too = addresses(["10.20.1.20", "2001:db8::20"]);
    assert_eq!(
        lab.run(routes.remove(&theirs_too)).unwrap(),
        Removed::default()
    );
    assert_eq!(theirs(&lab), before);
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn what_a_routing_daemon_has_learnt_does_not_count_and_is_there_again_afterwards() {
    let lab = Lab::new();
    let routes = uplinked();
    for (family, address, via) in [
        ("-4", "10.20.1.10", "10.20.0.2"),
        ("-6", "2001:db8::10", "2001:db8::2"),
    ] {
        let way = |lab: &Lab| lab.ip(&format!("{family} route get {address}"));
        lab.ip(&format!(
            "{family} route add {address} via {via} proto bird metric 32"
        ));
        assert!(way(&lab).contains("dev up0"));
        let vm = addresses([address]);
        lab.run(routes.put(&vm, "tap0")).unwrap();
        assert!(way(&lab).contains("dev tap0"), "{}", way(&lab));
        lab.run(routes.remove(&vm)).unwrap();
        assert!(way(&lab).contains("dev up0"), "{}", way(&lab));
    }
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn an_interface_that_goes_takes_its_routes_along() {
    let lab = Lab::new();
    let routes = uplinked();
    lab.run(routes.put(&vm(), "tap0")).unwrap();
    // Nothing is left over while there is the route.
    assert_eq!(lab.run(uplinked().sweep()).unwrap(), Removed::default());
    lab.ip("link del tap0");
    let left = Removed {
        routes: 0,
        proxies: 2,
    };
    assert_eq!(lab.run(routes.remove(&vm())).unwrap(), left);
    // Likewise where the process that put them there ended before.
    lab.run(routes.put(&vm(), "tap1")).unwrap();
    drop(routes);
    lab.ip("link del tap1");
    assert_eq!(lab.run(uplinked().sweep()).unwrap(), left);
    assert_eq!(lab.proxies(), "");
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn uplinks_are_where_the_default_routes_lead() {
    let lab = Lab::new();
    let routes = Routes::new();
    lab.run(routes.put(&vm(), "tap0")).unwrap();
    // There is none.
    assert_eq!(lab.proxies(), "");
    lab.ip("route add default via 10.20.0.2");
    lab.ip("-6 route add default via 2001:db8::2");
    // Not of the main table, so not meant.
    lab.ip("route add default dev tap1 table 77");
    lab.run(routes.put(&vm(), "tap0")).unwrap();
    let proxies = lab.proxies();
    assert_eq!(proxies.lines().count(), 2, "{proxies}");
    assert_eq!(proxies.matches("dev up0").count(), 2, "{proxies}");
    // Nobody is answered for where they are.
    lab.run(routes.put(&addresses(["10.20.0.2"]), "up0"))
        .unwrap();
    assert!(!lab.proxies().contains("10.20.0.2"));
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn failures_name_what_and_where_and_stop_nothing() {
    let lab = Lab::new();
    let error = lab.run(uplinked().put(&vm(), "tap7")).unwrap_err();
    assert!(matches!(error, Error::Interface { .. }), "{error:?}");
    assert!(error.to_string().contains("tap7"), "{error}");

    lab.ip("link set tap1 down");
    let routes = Routes::with_uplinks(vec!["up7".to_owned(), "up0".to_owned()]);
    let error = lab.run(routes.put(&vm(), "tap1")).unwrap_err();
    let text = error.to_string();
    for part in ["the route to 10.20.1.10 on tap1", "is down", "up7"] {
        assert!(text.contains(part), "{text}");
    }
    // The rest is done.
    assert_eq!(lab.proxies().matches("dev up0").count(), 2);
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn a_neighbour_finds_the_vm_behind_the_host() {
    let lab = Lab::new();
    lab.answer();
    lab.run(uplinked().put(&vm(), "tap0")).unwrap();
    for address in vm() {
        until("the neighbour knows the VM at the host's uplink", || {
            lab.seek(address);
            lab.known(&address.to_string()).contains(&lab.mac())
        });
    }
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test routes -- --ignored"]
fn an_announcement_brings_the_neighbour_over() {
    let lab = Lab::new();
    for address in vm() {
        ip(&format!(
            "-n {} neigh replace {address} lladdr 02:00:00:00:00:99 dev eth0 nud stale",
            lab.peer
        ));
    }
    within(&lab.host, || announce::on_uplink("up0", &vm())).unwrap();
    for address in vm() {
        until("the neighbour has heard it", || {
            lab.known(&address.to_string()).contains(&lab.mac())
        });
    }
}
