//! Signs of where the guest is, from several sources, fused.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Side, Timestamp};

/// How late one source on a node may tell of the pause that another has told of: libvirt does when it
/// has written the domain's state to its disk, by when the guest may run again. What is later is
/// another pause.
const LATE: Duration = Duration::from_secs(1);

/// What a signal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SignalKind {
    /// The guest stopped on the source for its last bit of state to be copied.
    Paused,
    /// The guest announced itself on the target, or was seen to run there.
    ResumedOnTarget,
    /// The guest runs on the source again: the migration failed after the pause.
    ResumedOnSource,
}

/// Where a signal comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SignalSource {
    /// Southbound `Port_Binding.options:additional-chassis-activated`: the target's ovn-controller
    /// saw the announcement that its activation strategy waits for.
    Activation,
    /// `targetNodeDomainReadyTimestamp` of the VirtualMachineInstance's migration state.
    DomainReady,
    /// Annotation `kubevirt.io/migration-target-ready-timestamp` of the target pod.
    PodAnnotation,
    /// The migration's own end, as the VirtualMachineInstance or the migration object tells it.
    MigrationEnd,
    /// An agent: a lifecycle event of libvirt's on its node.
    Libvirt,
    /// An agent: an event of QEMU's own monitor protocol.
    Qmp,
    /// An agent: a RARP frame (RFC 903) from the guest's MAC on its port. QEMU sends it for the guest
    /// when all of its state has arrived, up to 100 ms before the guest runs under libvirt.
    Rarp,
    /// An agent: a gratuitous ARP (RFC 5227, section 3) from the guest.
    Garp,
    /// An agent: an unsolicited neighbour advertisement (RFC 4861, section 7.2.6) from the guest.
    NeighbourAdvertisement,
}

impl SignalSource {
    /// Whether it is a hypervisor on a node that tells, by an agent.
    pub fn is_hypervisor(self) -> bool {
        matches!(self, Self::Libvirt | Self::Qmp)
    }

    /// Whether it is a frame of the guest's that tells, by an agent.
    pub fn is_announcement(self) -> bool {
        matches!(self, Self::Rarp | Self::Garp | Self::NeighbourAdvertisement)
    }

    /// Whether it is KubeVirt that tells.
    fn is_kubevirt(self) -> bool {
        matches!(
            self,
            Self::DomainReady | Self::PodAnnotation | Self::MigrationEnd
        )
    }
}

impl fmt::Display for SignalSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What an agent saw of the guest on its own node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sighting {
    /// It stopped to be handed over.
    Stopped,
    /// It runs here.
    Runs,
    /// It is here no more, because it had been handed over.
    Left,
}

impl Sighting {
    /// What a sighting on this side says; `None` where it is not to be believed.
    ///
    /// Only a hypervisor knows of a pause and of what becomes of a guest afterwards: frames can be
    /// forged by the guest, and on the source it sends them all the time. What a source says of the
    /// guest's running or having left means something only once that guest has `paused`: before, it
    /// is only being copied. The target may speak of a guest that nobody saw pause: there may be no
    /// agent on its source.
    pub fn says(self, on: Side, source: SignalSource, paused: bool) -> Option<SignalKind> {
        let hypervisor = source.is_hypervisor();
        match (self, on) {
            (Self::Stopped, Side::Source) if hypervisor => Some(SignalKind::Paused),
            (Self::Left, Side::Source) if hypervisor && paused => Some(SignalKind::ResumedOnTarget),
            (Self::Runs, Side::Source) if hypervisor && paused => Some(SignalKind::ResumedOnSource),
            (Self::Runs, Side::Target) if hypervisor || source.is_announcement() => {
                Some(SignalKind::ResumedOnTarget)
            }
            _ => None,
        }
    }
}

/// One sign of where the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signal {
    /// What it says.
    pub kind: SignalKind,
    /// Who says it.
    pub source: SignalSource,
    /// When it was first seen.
    pub at: Timestamp,
}

impl Signal {
    /// Whether it can come true more than once: a guest whose migration goes on may be paused and
    /// resumed, by a person for one, before it is paused to leave. Its source's hypervisor tells.
    pub fn is_turn(&self) -> bool {
        let turns = [SignalKind::Paused, SignalKind::ResumedOnSource];
        turns.contains(&self.kind) && self.source.is_hypervisor()
    }

    /// Whether an agent told.
    pub fn is_agents(&self) -> bool {
        self.source.is_hypervisor() || self.source.is_announcement()
    }

    /// Whether this pause is a later one than that from which a guest came `back`. Both are told by
    /// agents of the source, with stamps of its clock; a source tells what it tells in order.
    fn ends(&self, back: &Self) -> bool {
        let told_by_agents = self.is_turn() && back.is_turn();
        let late = if self.source == back.source {
            Duration::ZERO
        } else {
            LATE
        };
        told_by_agents && self.kind == SignalKind::Paused && self.at > back.at.after(late)
    }
}

/// Where the signals, taken together, say the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestPlace {
    /// Nothing says that it left the source.
    Source,
    /// It paused on the source and has not been seen to run since.
    InTransit,
    /// It runs on the target.
    Target,
    /// It runs on the source after it had paused or had been reported on the target.
    BackOnSource,
}

/// The signals of one handover.
///
/// # Guarantees
///
/// The earliest sign acts, later ones of the same kind and source change nothing, but for
/// [turns](Signal::is_turn), of which the latest is kept too. The result does not depend on how often
/// or in which order signals are reported, only on which there are.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signals(Vec<Signal>);

impl Signals {
    /// Takes note of a signal. Says whether it was news: the first of its kind from its source, an
    /// earlier time for it, or, of a turn, a later one.
    pub fn note(&mut self, signal: Signal) -> bool {
        let is_same = |known: &Signal| (known.kind, known.source) == (signal.kind, signal.source);
        let times = self.0.iter().filter(|known| is_same(known));
        let times: Vec<_> = times.map(|known| known.at).collect();
        if let (Some(first), Some(last)) = (times.iter().min(), times.iter().max()) {
            let is_later = signal.is_turn() && *last < signal.at;
            if *first <= signal.at && !is_later {
                return false;
            }
            // The first stays, where it is one; so does the last of a turn.
            let outer = if is_later { first } else { last };
            let stays = |known: &Signal| signal.is_turn() && known.at == *outer;
            self.0.retain(|known| !is_same(known) || stays(known));
        }
        self.0.push(signal);
        self.0
            .sort_by_key(|signal| (signal.at, signal.kind, signal.source));
        true
    }

    /// The signals, earliest first.
    pub fn iter(&self) -> impl Iterator<Item = &Signal> {
        self.0.iter()
    }

    /// The earliest signal of a kind.
    pub fn first(&self, kind: SignalKind) -> Option<&Signal> {
        self.iter().find(|signal| signal.kind == kind)
    }

    /// Where the guest is.
    ///
    /// A guest that runs on the source again wins over signs of the target: QEMU announces the target
    /// before the source has let go, and libvirt resumes the source only once the target is dead. Only
    /// KubeVirt's word of the target outweighs an agent's of the source: an agent can be wrong, and
    /// KubeVirt has that word from a domain that runs. And only an agent's word of a later pause ends
    /// what an agent said of the source before.
    pub fn guest(&self) -> GuestPlace {
        if self.is_back() {
            GuestPlace::BackOnSource
        } else if self.arrival().is_some() {
            GuestPlace::Target
        } else if self.first(SignalKind::Paused).is_some() {
            GuestPlace::InTransit
        } else {
            GuestPlace::Source
        }
    }

    /// The earliest sign that the guest runs on the target, of those that were not refuted: after what
    /// anybody but KubeVirt says of the target, the guest can have run on the source again, and paused
    /// again.
    ///
    /// This compares clocks of two nodes. Where the target's is so far behind that its word seems to be
    /// from before, KubeVirt's is waited for.
    pub fn arrival(&self) -> Option<&Signal> {
        let backs = self.of(SignalKind::ResumedOnSource);
        let refuted = backs.filter(|back| self.is_over(back)).map(|back| back.at);
        let refuted = refuted.max();
        let counts = |signal: &&Signal| {
            signal.source.is_kubevirt() || refuted.is_none_or(|until| until < signal.at)
        };
        self.of(SignalKind::ResumedOnTarget).find(counts)
    }

    /// Whether KubeVirt says that the guest runs on the target.
    pub fn is_arrival_kubevirts(&self) -> bool {
        let mut arrivals = self.of(SignalKind::ResumedOnTarget);
        arrivals.any(|signal| signal.source.is_kubevirt())
    }

    /// Whether nobody but an agent says that the guest runs on the source again.
    pub fn is_back_by_agents_alone(&self) -> bool {
        let mut back = self.back().peekable();
        back.peek().is_some() && back.all(|signal| signal.source.is_hypervisor())
    }

    fn is_back(&self) -> bool {
        if self.is_back_by_agents_alone() {
            !self.is_arrival_kubevirts()
        } else {
            self.back().next().is_some()
        }
    }

    /// Who says that the guest runs on the source again, as far as no later pause ended that.
    fn back(&self) -> impl Iterator<Item = &Signal> {
        let backs = self.of(SignalKind::ResumedOnSource);
        backs.filter(|back| !self.is_over(back))
    }

    /// Whether the guest paused again after it had come `back`.
    fn is_over(&self, back: &Signal) -> bool {
        self.iter().any(|signal| signal.ends(back))
    }

    fn of(&self, kind: SignalKind) -> impl Iterator<Item = &Signal> {
        self.iter().filter(move |signal| signal.kind == kind)
    }
}

impl FromIterator<Signal> for Signals {
    fn from_iter<I: IntoIterator<Item = Signal>>(signals: I) -> Self {
        let mut fused = Self::default();
        for signal in signals {
            fused.note(signal);
        }
        fused
    }
}
