//! What has to hold after a migration.

use crate::report::{Check, Direction, Migration};
use crate::scenario::{Expect, Outcome};

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

    /// `value` is at most `most`, where there is a bound.
    fn at_most<N: PartialOrd + std::fmt::Display + Copy>(
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
/// runs, `before` how the port was before the first migration.
pub(super) fn port(
    checks: &mut Checks,
    name: &str,
    now: Option<&PortView>,
    before: &PortView,
    chassis: &str,
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
        now.requested == requested,
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
    checks.that(
        format!("the TCP stream of {vm} survives"),
        migration.tcp.survived == expect.tcp_survives,
        || match &migration.tcp.error {
            Some(error) => format!("it broke: {error}"),
            None => "it did".to_owned(),
        },
    );
    let (to_vm, from_vm) = (&migration.to_vm, &migration.from_vm);
    checks.at_most(
        format!("packets lost towards {vm}"),
        to_vm.lost,
        expect.to_vm_max_lost,
    );
    checks.at_most(
        format!("packets lost from {vm}"),
        from_vm.lost,
        expect.from_vm_max_lost,
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
    if let Some(most) = expect.max_network_added_ms {
        let what = format!("milliseconds that the network added for {vm}");
        match migration.network_added_ms {
            Some(added) => checks.at_most(what, added, Some(most)),
            None => checks.that(what, false, || "not measured".to_owned()),
        }
    }
    arrived(checks, vm, "towards", to_vm);
    arrived(checks, vm, "from", from_vm);
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
mod tests {
    use super::*;

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
        port(&mut checks, "p", now, before, "node2");
        let failed = checks.0.into_iter().filter(|check| !check.held());
        failed.map(|check| check.what).collect()
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
