//! Whose request a port bears, and what the Southbound makes of it.

use super::own_mark;
use crate::mend::Mend;
use crate::{Chassis, GuestPlace, Observed, Original, Outcome, Port, Side, Waiting};

/// Whose `requested-chassis` a port bears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Nothing is requested.
    Unset,
    /// One chassis where the guest is, or that it has left: its owner's, and it moves with the guest.
    Pinned,
    /// What a handover wrote: this one, an earlier one that has not let go, or the network's owner
    /// for the same migration.
    Handover,
    /// Several chassis, with the guest on none of them, or none but where it was and is: left over from
    /// a handover that nobody ended.
    Leftover,
    /// Somebody's choice.
    Theirs,
}

/// Whose request `port` bears.
pub(super) fn request(observed: &Observed, port: &Port) -> Request {
    let names: Vec<_> = names(port).collect();
    let ends = || observed.source.iter().chain(&observed.target);
    let is_end = |name: &&str| ends().any(|chassis| chassis.is_named_by(name));
    if names.is_empty() {
        return Request::Unset;
    }
    let is_left = |name: &str| {
        let mut left = observed.former.iter().chain(&observed.source);
        left.any(|chassis| chassis.is_named_by(name))
    };
    if let Some(mark) = &port.config.mark {
        let is_marked = |name: &str| mark.source == name || mark.target == name;
        let several = names.len() > 1;
        let mut all = names.iter();
        let ours = all.all(|name| is_end(name) || is_marked(name) || is_left(name));
        return if several || ours || !Mend::NewerChoice.holds() {
            Request::Handover
        } else {
            Request::Theirs
        };
    }
    let here = guest_is_on(observed);
    let is_here = |name: &str| here.is_some_and(|here| here.is_named_by(name));
    // Its first chassis has not claimed the port, so nobody goes by it.
    let is_dead = port.binding.chassis.is_none() && !port.is_unclaimed();
    let adopts = Mend::LeftoverList.holds();
    match &names[..] {
        [one] if is_here(one) || is_left(one) => Request::Pinned,
        [_] => Request::Theirs,
        _ if !adopts => Request::Theirs,
        [a, b] if a != b && is_end(a) && is_end(b) => Request::Handover,
        several if is_dead || several.iter().all(|name| is_here(name) || is_left(name)) => {
            Request::Leftover
        }
        several if several.iter().any(|name| is_here(name)) => Request::Theirs,
        _ => Request::Leftover,
    }
}

/// Where the guest is, as far as KubeVirt says.
fn guest_is_on(observed: &Observed) -> Option<&Chassis> {
    let moved = observed.signals.guest() == GuestPlace::Target;
    match observed.outcome {
        Outcome::GuestOn(Side::Target) => observed.target.as_ref(),
        Outcome::Running if moved && observed.signals.is_arrival_kubevirts() => {
            observed.target.as_ref()
        }
        _ => observed.source.as_ref(),
    }
}

/// The chassis that a port is requested on, as its request names them.
fn names(port: &Port) -> impl Iterator<Item = &str> {
    let requested = port.config.requested_chassis.as_deref().unwrap_or_default();
    let names = requested.split(',').map(str::trim);
    names.filter(|name| !name.is_empty())
}

/// Whether a port is requested on exactly these, in this order, whatever they are called by.
pub(super) fn names_exactly(port: &Port, chassis: &[&Chassis]) -> bool {
    let mut names = names(port);
    let all = chassis
        .iter()
        .all(|chassis| names.next().is_some_and(|name| chassis.is_named_by(name)));
    all && names.next().is_none()
}

/// Whether a port is requested on more than one chassis.
pub(super) fn is_several(port: &Port) -> bool {
    names(port).nth(1).is_some()
}

/// Whether the request lets `chassis` claim the port.
pub(super) fn allows(port: &Port, chassis: &Chassis) -> bool {
    let mut names = names(port).peekable();
    names.peek().is_none() || names.any(|name| chassis.is_named_by(name))
}

/// What to put back when the handover is over.
pub(super) fn original(observed: &Observed, port: &Port, place: &Chassis) -> Original {
    match (&port.config.mark, request(observed, port)) {
        // A port taken over from an older handover that has not let go yet: what stood there before
        // *that* one is what its user chose; only the place has changed since.
        (Some(older), _) => Original {
            requested_chassis: older
                .original
                .requested_chassis
                .as_ref()
                .map(|_| place.name.clone()),
            activation_strategy: older.original.activation_strategy.clone(),
        },
        // A list is of a handover's time. What stood before it nobody knows.
        (None, Request::Handover | Request::Leftover) => Original::default(),
        (None, _) => Original {
            requested_chassis: port.config.requested_chassis.clone(),
            activation_strategy: port.config.activation_strategy.clone(),
        },
    }
}

/// A port that the Southbound has on chassis of which none is one of `ends`.
///
/// What KubeVirt says of the guest, or what a label says of the port, is wrong then, and a request
/// made of it would take the port from where the guest is.
pub(super) fn contradiction<'a>(
    observed: &Observed,
    ends: impl IntoIterator<Item = &'a Chassis>,
    counts: impl Fn(&Port) -> bool,
) -> Option<Waiting> {
    let ends: Vec<_> = ends.into_iter().collect();
    // What KubeVirt says of this very migration is newer than what it says of those before.
    let is_left = |name: &String| {
        let mut former = observed.former.iter();
        observed.is_named && former.any(|chassis| chassis.name == *name)
    };
    let is_elsewhere = |port: &&Port| {
        let mut claimed = port.binding.claimed();
        let is_end = |name: &String| ends.iter().any(|end| end.name == *name);
        let none = !claimed.any(|name| is_end(name) || is_left(name));
        none && !port.is_unclaimed()
    };
    let found = observed
        .ports
        .iter()
        .filter(|port| counts(port))
        .find(is_elsewhere);
    found
        .filter(|_| Mend::BoundElsewhere.holds())
        .map(|port| Waiting::BoundElsewhere {
            port: port.name.clone(),
            chassis: port.binding.claimed().cloned().collect(),
        })
}

/// Whether what is known of an earlier migration contradicts that this one is under way, or leaves
/// from there.
pub(super) fn is_old_news(observed: &Observed, source: &Chassis) -> bool {
    let earlier = &observed.earlier;
    let left_elsewhere = earlier.left_guest_on.as_ref();
    let left_elsewhere = left_elsewhere.is_some_and(|chassis| chassis.name != source.name);
    let begun = held(observed).next().is_some();
    !begun
        && !observed.is_named
        && (earlier.under_way || left_elsewhere)
        && Mend::BoundElsewhere.holds()
}

/// The wait for somebody to take back a choice that keeps this port from `here`.
pub(super) fn theirs(port: &Port) -> Waiting {
    Waiting::ForeignRequest {
        port: port.name.clone(),
        requested: port.config.requested_chassis.clone().unwrap_or_default(),
    }
}

/// The ports that this handover holds.
pub(super) fn held(observed: &Observed) -> impl Iterator<Item = &Port> {
    let ports = observed.ports.iter();
    ports.filter(|port| own_mark(observed, port).is_some())
}
