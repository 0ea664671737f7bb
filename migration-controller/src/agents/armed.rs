//! One handover that is armed: what its ends were told, and what they saw.

use handover::{Side, Sighting, SignalKind, SignalSource};
use node_hooks_api::agent as wire;
use node_hooks_api::agent::to_agent::Message;

use super::board::{CLOCK_ERROR, Learned, Order, Standing, Taken};
use super::opening::{Opening, Pause, is_news};
use super::time::Nanos;
use crate::api::{OpeningResult, SignalSeen};

/// How many further pauses of one guest are taken in. A person makes a few; an agent that makes up more does not have the
/// record written without end.
const MOST_TURNS: usize = 16;

#[derive(Debug)]
pub(super) struct Armed {
    pub(super) standing: Standing,
    /// What each end's agent was last told.
    pub(super) told: Ends<Option<wire::Arm>>,
    pause: Option<Pause>,
    signals: Vec<AgentSignal>,
    /// How many pauses were told after the first one of a source.
    turns: usize,
    pub(super) opening: Option<Opening>,
    /// By the position of the port.
    frames: Vec<Frames>,
}

#[derive(Debug, Default)]
pub(super) struct Ends<T> {
    source: T,
    target: T,
}

#[derive(Debug)]
struct AgentSignal {
    kind: SignalKind,
    source: SignalSource,
    node: String,
    at: Nanos,
    /// `at` is the node's own stamp.
    stamped: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Frames {
    last: Option<Nanos>,
    first: Option<Nanos>,
}

// === impl Armed ===

impl Armed {
    pub(super) fn new(standing: Standing) -> Self {
        Self {
            standing,
            told: Ends::default(),
            pause: None,
            signals: Vec::new(),
            turns: 0,
            opening: None,
            frames: Vec::new(),
        }
    }

    pub(super) fn is_same(&self, other: &Standing) -> bool {
        let ours = &self.standing;
        (&ours.migration, ours.epoch) == (&other.migration, other.epoch)
    }

    /// The same handover, as it stands now.
    pub(super) fn update(&mut self, standing: Standing, orders: &mut Vec<Order>) {
        let before = std::mem::replace(&mut self.standing, standing);
        let nodes = [&self.standing.source.node, &self.standing.target.node];
        for (side, post) in [
            (Side::Source, &before.source),
            (Side::Target, &before.target),
        ] {
            if self.standing.post(side).node == post.node {
                continue;
            }
            // The target's pod was made again elsewhere: what the first one's node told is history.
            *self.told.get_mut(side) = None;
            self.frames.clear();
            self.opening = None;
            if !nodes.contains(&&post.node) {
                orders.push(before.disarm(side, false));
            }
        }
    }

    /// Takes leave of the nodes that are not among these.
    pub(super) fn say_farewell(
        &self,
        but: &[String],
        guest_on: Option<&str>,
        orders: &mut Vec<Order>,
    ) {
        for side in [Side::Source, Side::Target] {
            let node = &self.standing.post(side).node;
            if !but.contains(node) {
                let stays = guest_on == Some(node.as_str());
                orders.push(self.standing.disarm(side, stays));
            }
        }
    }

    pub(super) fn side_of(&self, node: &str) -> Option<Side> {
        let sides = [Side::Source, Side::Target];
        let mut sides = sides.into_iter();
        sides.find(|side| self.standing.post(*side).node == node)
    }

    /// Tells a side's agent what it does not know yet.
    pub(super) fn arm(&mut self, side: Side, orders: &mut Vec<Order>) {
        let arm = self.standing.arm(side);
        let told = self.told.get_mut(side);
        if told.as_ref() == Some(&arm) {
            return;
        }
        *told = Some(arm.clone());
        orders.push(Order::Tell {
            node: self.standing.post(side).node.clone(),
            message: Message::Arm(arm),
        });
    }

    /// Has the target opened, where the guest has just paused while all was ready, and has not been
    /// heard of since.
    pub(super) fn open(&mut self, commands: &mut u64, orders: &mut Vec<Order>) {
        let Some(pause) = self.pause.filter(|pause| pause.opens) else {
            return;
        };
        let heard_of = |kind| self.signals.iter().any(|signal| signal.kind == kind);
        let moved = heard_of(SignalKind::ResumedOnTarget) || heard_of(SignalKind::ResumedOnSource);
        let done = self.opening.as_ref();
        if moved || done.is_some_and(|opening| opening.result != OpeningResult::NoAgent) {
            return;
        }
        *commands += 1;
        self.opening = Some(Opening::asked(pause, *commands));
        orders.push(Order::Open {
            vm: self.standing.vm.clone(),
            node: self.standing.target.node.clone(),
            open: wire::Open {
                id: Some(self.standing.id()),
                command: *commands,
                paused_at_ns: pause.at.0,
                heard_at_ns: pause.heard.0,
            },
        });
    }

    /// Has the source tell where the guest is, if the target was told to have it: what opens a port
    /// is an announcement, and switches outside of OVN have learned from it.
    pub(super) fn announce(&mut self, commands: &mut u64, orders: &mut Vec<Order>) {
        let told = [OpeningResult::Asked, OpeningResult::Opened];
        let opening = self.opening.as_ref();
        if !opening.is_some_and(|opening| told.contains(&opening.result)) {
            return;
        }
        *commands += 1;
        let announce = wire::Announce {
            id: Some(self.standing.id()),
            command: *commands,
        };
        orders.push(Order::Tell {
            node: self.standing.source.node.clone(),
            message: Message::Announce(announce),
        });
    }

    pub(super) fn sighted(
        &mut self,
        side: Side,
        sighting: Sighting,
        signal: &wire::Signal,
        now: Nanos,
    ) -> Taken {
        let paused = self.pause.is_some() || self.standing.paused;
        let source = signal_source(signal.source());
        let said = source.and_then(|source| Some((sighting.says(side, source, paused)?, source)));
        let Some((kind, source)) = said else {
            return Taken::Refused;
        };
        let node = &self.standing.post(side).node;
        let (stamp, seen) = (Nanos(signal.at_ns), Nanos(signal.seen_at_ns));
        // Both stamps are of the source's clock: an older resume is from before the pause.
        let is_old = |pause: Pause| stamp < pause.at;
        if kind == SignalKind::ResumedOnSource && self.pause.is_some_and(is_old) {
            return Taken::Refused;
        }
        let stamped = stamp.is_within(CLOCK_ERROR, now);
        let told = AgentSignal {
            kind,
            source,
            node: node.clone(),
            at: if stamped { stamp } else { now },
            stamped,
        };
        if self.signals.iter().any(|known| known.is_same(&told)) && !self.take_turn(&told) {
            return Taken::Known;
        }
        if kind == SignalKind::Paused && self.pause.is_none() {
            let believed = |at: Nanos| {
                if at.is_within(CLOCK_ERROR, now) {
                    at
                } else {
                    Nanos(0)
                }
            };
            self.pause = Some(Pause {
                at: believed(stamp),
                seen: believed(seen),
                heard: now,
                opens: self.standing.prepared && is_news(stamp, now),
            });
        }
        self.signals.push(told);
        Taken::New
    }

    /// Whether this is told again because it happened again: the guest had turned since this source told of it last, by
    /// the stamps of its node. Then it takes the place of what was told last; the first stays.
    fn take_turn(&mut self, told: &AgentSignal) -> bool {
        let turned = match told.kind {
            SignalKind::Paused => SignalKind::ResumedOnSource,
            SignalKind::ResumedOnSource => SignalKind::Paused,
            SignalKind::ResumedOnTarget => return false,
        };
        let stamped = || self.signals.iter().filter(|known| known.stamped);
        let same = stamped().filter(|known| known.is_same(told));
        let Some(last) = same.map(|known| known.at).max() else {
            return false;
        };
        let between = |known: &AgentSignal| {
            known.kind == turned && known.node == told.node && last < known.at && known.at < told.at
        };
        if !told.stamped || !stamped().any(between) {
            return false;
        }
        if told.kind == SignalKind::Paused {
            if self.turns == MOST_TURNS {
                return false;
            }
            self.turns += 1;
        }
        let is_same = |known: &AgentSignal| known.is_same(told);
        let first = self.signals.iter().position(is_same);
        let mut position = 0..;
        self.signals
            .retain(|known| position.next() == first || !known.is_same(told));
        true
    }

    pub(super) fn framed(&mut self, side: Side, signal: &wire::Signal, now: Nanos) -> Taken {
        use wire::signal::Kind;
        let ports = &self.standing.post(side).ports;
        let place = ports.iter().position(|port| port.name == signal.port);
        let at = Nanos(signal.at_ns);
        let Some(place) = place.filter(|_| at.is_within(CLOCK_ERROR, now)) else {
            return Taken::Refused;
        };
        let ports = ports.len();
        if self.frames.len() < ports {
            self.frames.resize(ports, Frames::default());
        }
        let Some(frames) = self.frames.get_mut(place) else {
            return Taken::Refused;
        };
        let (is_news, known) = match (signal.kind(), side) {
            (Kind::LastFrame, Side::Source) => (frames.last < Some(at), &mut frames.last),
            (Kind::FirstFrame, Side::Target) => {
                let is_earlier = frames.first.is_none_or(|first| at < first);
                (is_earlier, &mut frames.first)
            }
            _ => return Taken::Refused,
        };
        if !is_news {
            return Taken::Known;
        }
        *known = Some(at);
        Taken::New
    }

    /// What has been told of it.
    pub(super) fn learned(&self) -> Learned {
        let opening = self.opening.as_ref();
        Learned {
            signals: self.signals.iter().map(AgentSignal::seen).collect(),
            turns: self.turns(),
            opening: opening.map(Opening::record),
            opened_at: opening.and_then(Opening::opened_at),
            pause_ms: self.pause_ms(),
            blackout_ms: self.blackout_ms(),
        }
    }

    /// What can happen again, as far as its stamp says when it happened last.
    fn turns(&self) -> Vec<SignalSeen> {
        let stamped = self.signals.iter().filter(|signal| signal.stamped);
        let kinds = [SignalKind::Paused, SignalKind::ResumedOnSource];
        let turns = stamped.filter(|signal| kinds.contains(&signal.kind));
        turns.map(AgentSignal::seen).collect()
    }

    fn pause_ms(&self) -> Option<f64> {
        let target = &self.standing.target.node;
        let stamps = |kind| {
            let stamped = self.signals.iter().filter(|signal| signal.stamped);
            stamped.filter(move |signal| signal.kind == kind)
        };
        // The pause in which it left: after an earlier one it ran on.
        let back = stamps(SignalKind::ResumedOnSource).map(|signal| signal.at);
        let back = back.max();
        // By the same kind of source at either end, so that both are as late: QEMU's own stamps before libvirt's, which are
        // milliseconds, and of when it was heard.
        [SignalSource::Qmp, SignalSource::Libvirt]
            .into_iter()
            .find_map(|source| {
                let mut paused = stamps(SignalKind::Paused);
                let paused =
                    paused.find(|signal| signal.source == source && back < Some(signal.at))?;
                let mut resumed = stamps(SignalKind::ResumedOnTarget);
                let resumed =
                    resumed.find(|signal| signal.source == source && signal.node == *target)?;
                millis(paused.at, resumed.at)
            })
    }

    fn blackout_ms(&self) -> Option<f64> {
        let of_port = |frames: &Frames| millis(frames.last?, frames.first?);
        let ports = self.frames.iter().filter_map(of_port);
        ports.max_by(f64::total_cmp)
    }
}

/// Milliseconds, to the microsecond; nothing where time ran backwards.
fn millis(from: Nanos, to: Nanos) -> Option<f64> {
    let millis = to.moment().seconds_since(from.moment()) * 1e3;
    (to >= from).then_some((millis * 1e3).round() / 1e3)
}

fn signal_source(source: wire::signal::Source) -> Option<SignalSource> {
    use wire::signal::Source;
    match source {
        Source::Libvirt => Some(SignalSource::Libvirt),
        Source::Qmp => Some(SignalSource::Qmp),
        Source::Rarp => Some(SignalSource::Rarp),
        Source::Garp => Some(SignalSource::Garp),
        Source::NeighbourAdvertisement => Some(SignalSource::NeighbourAdvertisement),
        Source::Frame | Source::Unspecified => None,
    }
}

// === impl AgentSignal ===

impl AgentSignal {
    fn is_same(&self, other: &Self) -> bool {
        let key = |signal: &Self| (signal.kind, signal.source);
        key(self) == key(other) && self.node == other.node
    }

    fn seen(&self) -> SignalSeen {
        SignalSeen {
            kind: self.kind,
            source: self.source,
            at: self.at.moment(),
            node: Some(self.node.clone()),
        }
    }
}

// === impl Ends ===

impl<T> Ends<T> {
    pub(super) fn get_mut(&mut self, side: Side) -> &mut T {
        match side {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        }
    }
}
