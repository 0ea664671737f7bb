//! The flip: routes that depend on where the guest is follow it, all in one write.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::{Chassis, Expected, GuestPlace, Observed, PortWrite, RouteKey, Timestamp};

/// One route of the VM's, as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Which.
    pub key: RouteKey,
    /// Names of the chassis it leads to. None: it has no place yet. More than one: somebody broke
    /// it, and the next flip mends it.
    pub leads_to: BTreeSet<String>,
}

/// When routes follow the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FlipPolicy {
    /// On which sign.
    pub timing: FlipTiming,
    /// For how long after the guest resumed on the target its traffic with the outside stays with
    /// the gateway that carried it before, so that connections which that gateway translates live
    /// on; zero to follow at once.
    pub keep_egress: Duration,
}

/// On which sign routes follow the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FlipTiming {
    /// When the guest runs on the target.
    #[default]
    OnResume,
    /// When it pauses on the source, ahead of its resuming on the target. Where it resumes on the
    /// source instead, they go back.
    OnPause,
}

/// A change to one route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteWrite {
    /// Which.
    pub route: RouteKey,
    /// Where it must still lead for the write to be made.
    pub from: BTreeSet<String>,
    /// The name of the one chassis it will lead to; `None` for nowhere.
    pub to: Option<String>,
}

/// What makes every route lead to `to` alone. Nothing where no route can lead there: the guest's
/// traffic goes on through the gateway that it has.
pub(crate) fn to(observed: &Observed, to: &Chassis) -> Vec<RouteWrite> {
    moves(observed, to, |_| true)
}

/// What is to be flipped while the migration runs.
///
/// A route without a place gets the source's: whoever places guests at rest leaves those alone whose
/// migration is under way.
pub(crate) fn in_flight(
    observed: &Observed,
    source: &Chassis,
    target: &Chassis,
) -> Vec<RouteWrite> {
    let policy = &observed.flip;
    let ahead = policy.timing == FlipTiming::OnPause && policy.keep_egress.is_zero();
    match observed.signals.guest() {
        GuestPlace::Target if kept_until(observed).is_none() => to(observed, target),
        GuestPlace::InTransit if ahead => to(observed, target),
        _ => moves(observed, source, |route| route.leads_to.is_empty()),
    }
}

/// Until when the routes of a guest that runs on the target stay as they are; `None` when they are
/// to follow now.
pub(crate) fn kept_until(observed: &Observed) -> Option<Timestamp> {
    let keep = observed.flip.keep_egress;
    let is_served =
        |route: &Route| !route.leads_to.is_empty() && route.leads_to.is_subset(&observed.gateways);
    // A gateway that is gone keeps no connection alive.
    if keep.is_zero() || !observed.routes.iter().all(is_served) {
        return None;
    }
    let since = observed
        .signals
        .arrival()
        .map(|signal| signal.at)
        .or(observed.since.outcome);
    let until = since.unwrap_or(observed.now).after(keep);
    (until > observed.now).then_some(until)
}

/// The ports of the VM as guards: a flip is made only while they are what it was decided on.
pub(crate) fn guards(observed: &Observed) -> Vec<PortWrite> {
    let guard = |port: &crate::Port| PortWrite {
        port: port.name.clone(),
        expected: Expected::of(&port.config),
        config: port.config.clone(),
    };
    observed.ports.iter().map(guard).collect()
}

fn moves(observed: &Observed, to: &Chassis, which: impl Fn(&Route) -> bool) -> Vec<RouteWrite> {
    if !observed.gateways.contains(&to.name) {
        return Vec::new();
    }
    let only = BTreeSet::from([to.name.clone()]);
    let astray = observed
        .routes
        .iter()
        .filter(|route| route.leads_to != only && which(route));
    let write = |route: &Route| RouteWrite {
        route: route.key.clone(),
        from: route.leads_to.clone(),
        to: Some(to.name.clone()),
    };
    astray.map(write).collect()
}
