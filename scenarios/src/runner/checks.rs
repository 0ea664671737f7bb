//! What has to hold after a migration.

use std::net::IpAddr;

use crate::report::{Check, Direction, Flow, Forbidden, Migration};
use crate::scenario::{Cni, Expect, FlowExpect, Opener, Outcome, PRIMARY, Topology};

use super::bounds::{lost, lost_beyond, until_open_ms};
use super::migration::millis;
use super::ovn::PortView;

/// Gathers checks, held and failed ones alike.
#[derive(Debug, Default)]
pub(super) struct Checks(pub(super) Vec<Check>);

impl Checks {
    /// `what` has to hold; `found` says what was found where it did not.
    pub(super) fn that(
        &mut self,
        what: impl Into<String>,
        holds: bool,
        found: impl FnOnce() -> String,
    ) {
        self.0.push(Check {
            what: what.into(),
            failure: (!holds).then(found),
        });
    }

    /// What was done has to have worked.
    pub(super) fn worked<T>(&mut self, what: impl Into<String>, done: &anyhow::Result<T>) {
        let error = done.as_ref().err();
        self.that(what, error.is_none(), || {
            error.map_or_else(String::new, |error| format!("{error:#}"))
        });
    }

    /// `value` is at most `most`, where there is a bound.
    pub(super) fn at_most<N: PartialOrd + std::fmt::Display + Copy>(
        &mut self,
        what: impl Into<String>,
        value: N,
        most: Option<N>,
    ) {
        if let Some(most) = most {
            let what = format!("{}: at most {most}", what.into());
            self.that(what, value <= most, || format!("{value}"));
        }
    }
}

/// Where a port's binding and configuration must have come to rest: `chassis` is where the guest
/// runs, `before` how the port was before the first migration. A CNI that hands the port over leaves
/// that chassis requested, or nothing where it finds nothing requested in the end.
pub(super) fn port(
    checks: &mut Checks,
    name: &str,
    now: Option<&PortView>,
    before: &PortView,
    chassis: &str,
    cni: Option<Cni>,
) {
    let Some(now) = now else {
        checks.that(format!("port {name} exists"), false, || {
            "it is gone".to_owned()
        });
        return;
    };
    checks.that(
        format!("port {name} is bound to {chassis} alone"),
        now.chassis.as_deref() == Some(chassis) && now.additional.is_empty(),
        || {
            format!(
                "bound to {:?}, additionally {:?}",
                now.chassis, now.additional
            )
        },
    );
    let requested: Vec<_> = before
        .requested
        .iter()
        .map(|_| chassis.to_owned())
        .collect();
    checks.that(
        format!(
            "requested-chassis of port {name} is {}",
            requested.first().map_or("unset, as before", String::as_str)
        ),
        now.requested == requested || (cni.is_some() && now.requested == [chassis]),
        || format!("{:?}", now.requested),
    );
    checks.that(
        format!("activation-strategy of port {name} is as before"),
        now.strategy == before.strategy,
        || format!("{:?}, it was {:?}", now.strategy, before.strategy),
    );
    checks.that(
        format!("port {name} bears no mark"),
        now.marks.is_empty(),
        || format!("{:?}", now.marks),
    );
}

/// What the scenario expects of the figures.
pub(super) fn expectations(checks: &mut Checks, migration: &Migration, expect: &Expect) {
    let vm = &migration.vm;
    checks.that(
        format!("the handover of {vm} ends {:?}", expect.outcome),
        migration.outcome == expect.outcome,
        || format!("{:?}", migration.outcome),
    );
    let survived = migration.tcp.survived;
    checks.that(
        format!("the TCP stream of {vm} survives"),
        expect.tcp_survives.is_none_or(|due| survived == due),
        || {
            let why = migration.tcp.error.clone();
            why.unwrap_or_else(|| "it survived".to_owned())
        },
    );
    let (to_vm, from_vm) = (&migration.to_vm, &migration.from_vm);
    lost(
        checks,
        &format!("towards {vm}"),
        to_vm,
        expect.to_vm_max_lost_ms,
    );
    lost(
        checks,
        &format!("from {vm}"),
        from_vm,
        expect.from_vm_max_lost_ms,
    );
    let twice = to_vm.duplicated + from_vm.duplicated;
    checks.at_most(
        format!("packets of {vm} that arrived twice"),
        twice,
        expect.max_duplicated,
    );
    let moved = expect.outcome == Outcome::Succeeded;
    if moved {
        checks.that(
            format!("the pause of {vm} was seen"),
            migration.pause_ms.is_some(),
            || "QEMU's events do not tell of it".to_owned(),
        );
    }
    if let Some(most) = expect.max_lost_beyond_pause_ms {
        let what = format!("{most} ms longer than it pauses");
        lost_beyond(checks, migration, &what, migration.pause_ms, most);
    }
    if let Some(most) = expect.lost_until_open_ms {
        let what = format!("{most} ms longer than its port takes to open from when it is silent");
        lost_beyond(checks, migration, &what, until_open_ms(migration), most);
    }
    arrived(checks, vm, "towards", to_vm);
    arrived(checks, vm, "from", from_vm);
}

/// What has to have happened on the way of a migration that succeeded: that the target's port was
/// opened by the guest's own word, and that the routes followed in time. Without a controller for a
/// while they follow late, but not too early.
pub(super) fn on_the_way(
    checks: &mut Checks,
    migration: &Migration,
    expect: &Expect,
    killed: bool,
) {
    let (vm, timeline) = (&migration.vm, &migration.timeline_us);
    if migration.outcome != Outcome::Succeeded {
        return;
    }
    // A VM that is not waited for may be there before OVN has two chassis for its port.
    if !killed && expect.copy_after_ready != Some(false) {
        checks.that(
            format!("the port of {vm} was shut on the target until the guest announced itself"),
            timeline.activated.is_some(),
            || "OVN's databases did not tell of an activation: it was open all along".to_owned(),
        );
    }
    if migration.topology != Topology::Routed {
        return;
    }
    let flip = timeline.flipped.zip(timeline.resumed);
    checks.that(
        format!("the routes of {vm} flip to the target"),
        flip.is_some(),
        || {
            let (flipped, resumed) = (timeline.flipped, timeline.resumed);
            format!("resumed: {resumed:?}, flipped: {flipped:?}")
        },
    );
    let Some(after) = flip.map(|(flipped, resumed)| millis(flipped - resumed)) else {
        return;
    };
    let what = format!("milliseconds from the resume of {vm} to its flip");
    checks.at_most(what.as_str(), after, expect.max_flip_ms.filter(|_| !killed));
    if let Some(least) = expect.min_flip_ms {
        let what = format!("{what}: at least {least}");
        checks.that(what, after >= least, || format!("{after}"));
    }
}

/// What is expected of flows other than the primary one; `expected` is in their order.
pub(super) fn flows(checks: &mut Checks, vm: &str, flows: &[Flow], expected: &[FlowExpect]) {
    for (flow, expect) in flows.iter().zip(expected) {
        if flow.name == PRIMARY {
            continue;
        }
        let what = format!("{} of {vm}", flow.name);
        checks.that(
            if expect.tcp_survives {
                format!("the TCP stream of flow {what} survives")
            } else {
                format!("the TCP stream of flow {what} is cut")
            },
            flow.tcp.survived == expect.tcp_survives,
            || {
                flow.tcp
                    .error
                    .clone()
                    .unwrap_or_else(|| "it survived".to_owned())
            },
        );
        if let Some(least) = expect.tcp_lives_ms {
            checks.that(
                format!("the TCP stream of flow {what} outlives the pause by {least} ms"),
                flow.tcp.survived || flow.tcp_lived_ms.is_some_and(|lived| lived >= least),
                || format!("{:?} ms", flow.tcp_lived_ms),
            );
        }
        let (to_vm, from_vm) = (&flow.to_vm, &flow.from_vm);
        let way = |way| format!("{way} it, of flow {what}");
        lost(checks, &way("towards"), to_vm, expect.to_vm_max_lost_ms);
        lost(checks, &way("from"), from_vm, expect.from_vm_max_lost_ms);
        checks.at_most(
            format!("packets of flow {what} that arrived twice"),
            to_vm.duplicated + from_vm.duplicated,
            expect.max_duplicated,
        );
        arrived(checks, &what, "towards", to_vm);
        arrived(checks, &what, "from", from_vm);
        if flow.opened_by == Opener::Vm {
            checks.that(
                format!("the peer of flow {what} can tell where it comes from"),
                !flow.heard_from.is_empty(),
                || "nothing came".to_owned(),
            );
        }
    }
}

/// Where the peer of a flow that the VM opens heard it from: the `translated` addresses of gateways,
/// in this order and nothing else, or with none of them only the VM's `own`.
pub(super) fn heard_from(checks: &mut Checks, flow: &Flow, translated: &[IpAddr], own: IpAddr) {
    let due = if translated.is_empty() {
        &[own][..]
    } else {
        translated
    };
    checks.that(
        format!("flow {} is heard from {due:?}, in this order", flow.name),
        flow.heard_from == due,
        || format!("{:?}", flow.heard_from),
    );
}

/// What must not pass has been tried, would have been seen, and has not passed.
pub(super) fn forbidden(checks: &mut Checks, vm: &str, flows: &[Forbidden]) {
    for flow in flows {
        let (tried, proof) = (flow.tried, flow.proof);
        checks.that(
            format!("flow {} to {vm} is seen to pass while it may", flow.name),
            proof.reached > proof.sent / 2 && proof.sent > 0 && proof.answered > 0,
            || format!("{proof:?}"),
        );
        checks.that(
            format!("flow {} to {vm} is tried", flow.name),
            tried.sent > 0 && tried.attempted > 0,
            || format!("{tried:?}"),
        );
        checks.that(
            format!(
                "not one of {} packets and {} connections of flow {} reaches {vm}",
                tried.sent, tried.attempted, flow.name
            ),
            tried.reached == 0 && tried.answered == 0,
            || {
                format!(
                    "{} reached it, {} were answered",
                    tried.reached, tried.answered
                )
            },
        );
    }
}

/// A measurement in which nothing arrives proves nothing.
fn arrived(checks: &mut Checks, vm: &str, way: &str, direction: &Direction) {
    checks.that(
        format!("packets {way} {vm} arrived"),
        direction.received > direction.sent / 2,
        || format!("{} of {}", direction.received, direction.sent),
    );
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::report::{NewConnections, Tcp, Timeline, Tried};
    use crate::scenario::{Family, Peer};

    pub(in crate::runner) fn failed(checks: Checks) -> Vec<String> {
        let failed = checks.0.into_iter().filter(|check| !check.held());
        failed.map(|check| check.what).collect()
    }

    /// A flow in which a hundred packets arrived each way.
    fn flow() -> Flow {
        let direction = Direction {
            sent: 100,
            received: 100,
            ..Direction::default()
        };
        Flow {
            name: "out".to_owned(),
            peer: Peer::Outside,
            opened_by: Opener::Vm,
            target: ([172, 31, 0, 1], 7_000).into(),
            family: Family::Ipv4,
            to_vm: direction.clone(),
            from_vm: direction,
            tcp: Tcp {
                survived: true,
                ..Tcp::default()
            },
            tcp_lived_ms: None,
            new_connections: NewConnections::default(),
            heard_from: vec![[172, 31, 0, 11].into()],
            invalid: Vec::new(),
        }
    }

    /// A migration that succeeded, of a VM whose outside traffic flipped `flip_ms` after it resumed.
    pub(in crate::runner) fn migration(activated: bool, flip_ms: Option<i64>) -> Migration {
        const RESUMED: i64 = 200_000;
        let Flow { to_vm, from_vm, .. } = flow();
        Migration {
            vm: "vm".to_owned(),
            source: "node1".to_owned(),
            target: "node2".to_owned(),
            topology: Topology::Routed,
            strategy: String::new(),
            outcome: Outcome::Succeeded,
            timeline_us: Timeline {
                paused: Some(0),
                activated: activated.then_some(RESUMED + 2_000),
                resumed: Some(RESUMED),
                flipped: flip_ms.map(|ms| RESUMED + ms * 1_000),
                ..Timeline::default()
            },
            pause_ms: None,
            guest_wake_ms: None,
            silent_before_pause_ms: None,
            network_added_ms: None,
            network_added_error_ms: None,
            early_opening: None,
            gate_held_ms: None,
            to_vm,
            from_vm,
            tcp: Tcp::default(),
            new_connections: NewConnections::default(),
            flows: Vec::new(),
            forbidden: Vec::new(),
            gateway: Vec::new(),
            invalid: Vec::new(),
        }
    }

    #[test]
    fn a_port_that_was_never_shut_and_a_late_flip_are_failures() {
        let failures = |migration: &Migration, expect: &Expect| {
            let mut checks = Checks::default();
            on_the_way(&mut checks, migration, expect, false);
            failed(checks).len()
        };
        let usual = Expect::default();
        assert_eq!(failures(&migration(true, Some(150)), &usual), 0);
        assert_eq!(failures(&migration(true, Some(-50)), &usual), 0);
        assert_eq!(failures(&migration(true, Some(151)), &usual), 1);
        assert_eq!(failures(&migration(true, None), &usual), 1);
        assert_eq!(failures(&migration(false, Some(150)), &usual), 1);
        let kept = Expect {
            min_flip_ms: Some(5_000.0),
            max_flip_ms: None,
            ..Expect::default()
        };
        assert_eq!(failures(&migration(true, Some(5_000)), &kept), 0);
        assert_eq!(failures(&migration(true, Some(4_999)), &kept), 1);
        assert_eq!(failures(&migration(true, None), &kept), 1);

        let late = |expect: &Expect| {
            let mut checks = Checks::default();
            on_the_way(&mut checks, &migration(false, Some(900)), expect, true);
            failed(checks).len()
        };
        assert_eq!(late(&usual), 0);
        assert_eq!(late(&kept), 1);

        let shared = Migration {
            topology: Topology::Shared,
            ..migration(true, None)
        };
        assert_eq!(failures(&shared, &usual), 0);
        let back = Migration {
            outcome: Outcome::RolledBack,
            ..migration(false, None)
        };
        assert_eq!(failures(&back, &usual), 0);
    }

    #[test]
    fn a_cut_stream_is_a_failure_or_an_expectation() {
        let cut = Flow {
            tcp: Tcp::default(),
            tcp_lived_ms: Some(4_000.0),
            ..flow()
        };
        let failures = |flow: &Flow, expect: FlowExpect| {
            let mut checks = Checks::default();
            flows(&mut checks, "vm", std::slice::from_ref(flow), &[expect]);
            failed(checks)
        };
        let until = |tcp_survives, least| FlowExpect {
            tcp_survives,
            tcp_lives_ms: Some(least),
            ..FlowExpect::default()
        };
        assert!(failures(&flow(), FlowExpect::default()).is_empty());
        assert_eq!(failures(&cut, FlowExpect::default()).len(), 1);
        assert!(failures(&cut, until(false, 3_999.0)).is_empty());
        assert_eq!(failures(&cut, until(false, 4_001.0)).len(), 1);
        assert_eq!(failures(&flow(), until(false, 3_999.0)).len(), 1);
        let mut twice = flow();
        twice.to_vm.duplicated = 1;
        twice.from_vm.received = 0;
        assert_eq!(failures(&twice, FlowExpect::default()).len(), 2);
    }

    #[test]
    fn addresses_are_heard_in_their_order() {
        let [first, second, own] = [11, 12, 10].map(|host| IpAddr::from([172, 31, 0, host]));
        let holds = |heard: &[IpAddr], translated: &[IpAddr]| {
            let heard_from_them = Flow {
                heard_from: heard.to_vec(),
                ..flow()
            };
            let mut checks = Checks::default();
            heard_from(&mut checks, &heard_from_them, translated, own);
            failed(checks).is_empty()
        };
        assert!(holds(&[first, second], &[first, second]));
        assert!(!holds(&[first, own, second], &[first, second]));
        assert!(!holds(&[second, first], &[first, second]));
        assert!(!holds(&[first], &[first, second]));
        assert!(holds(&[own], &[]));
        assert!(!holds(&[own, first], &[]));
        assert!(!holds(&[], &[]));
    }

    #[test]
    fn what_is_forbidden_must_be_tried_and_provably_seen() {
        let tried = Tried {
            sent: 100,
            attempted: 10,
            reached: 0,
            answered: 0,
        };
        let proof = Tried {
            reached: 110,
            answered: 10,
            ..tried
        };
        let failures = |tried, proof| {
            let flow = Forbidden {
                name: "shut".to_owned(),
                peer: Peer::Client,
                target: ([10, 0, 0, 1], 7_001).into(),
                tried,
                proof,
            };
            let mut checks = Checks::default();
            forbidden(&mut checks, "vm", &[flow]);
            failed(checks).len()
        };
        assert_eq!(failures(tried, proof), 0);
        assert_eq!(failures(tried, tried), 1);
        assert_eq!(failures(Tried::default(), proof), 1);
        assert_eq!(
            failures(
                Tried {
                    reached: 1,
                    ..tried
                },
                proof
            ),
            1
        );
        assert_eq!(
            failures(
                Tried {
                    answered: 1,
                    ..tried
                },
                proof
            ),
            1
        );
    }

    fn view(requested: &[&str], chassis: &str, additional: &[&str]) -> PortView {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        PortView {
            requested: owned(requested),
            chassis: Some(chassis.to_owned()),
            additional: owned(additional),
            ..PortView::default()
        }
    }

    fn failures(now: Option<&PortView>, before: &PortView) -> Vec<String> {
        let mut checks = Checks::default();
        port(&mut checks, "p", now, before, "node2", None);
        failed(checks)
    }

    #[test]
    fn a_port_at_rest_passes_and_every_deviation_is_named() {
        let unset = view(&[], "node1", &[]);
        let pinned = view(&["node1"], "node1", &[]);
        assert!(failures(Some(&view(&["node2"], "node2", &[])), &pinned).is_empty());
        assert!(failures(Some(&view(&[], "node2", &[])), &unset).is_empty());

        let requested = |now: &PortView, before: &PortView| failures(Some(now), before);
        assert_eq!(requested(&view(&["node2"], "node2", &[]), &unset).len(), 1);
        assert_eq!(requested(&view(&["node1"], "node2", &[]), &pinned).len(), 1);
        assert_eq!(
            requested(&view(&["node2"], "node2", &["node1"]), &pinned).len(),
            1
        );
        assert_eq!(requested(&view(&["node2"], "node1", &[]), &pinned).len(), 1);
        let mut marked = view(&["node2"], "node2", &[]);
        marked
            .marks
            .insert("segue.io/owner".to_owned(), "segue".to_owned());
        marked.strategy = Some("rarp".to_owned());
        assert_eq!(requested(&marked, &pinned).len(), 2);
        assert_eq!(failures(None, &pinned), ["port p exists"]);
    }
}
