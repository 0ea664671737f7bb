//! Signs of where the guest is, from several sources, fused.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Timestamp;

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
}

impl fmt::Display for SignalSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
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
/// The earliest sign acts, later ones of the same kind and source change nothing: the result does
/// not depend on how often or in which order signals are reported, only on which there are.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signals(Vec<Signal>);

impl Signals {
    /// Takes note of a signal. Says whether it was news: the first of its kind from its source, or
    /// an earlier time for it.
    pub fn note(&mut self, signal: Signal) -> bool {
        let known = self
            .0
            .iter_mut()
            .find(|known| (known.kind, known.source) == (signal.kind, signal.source));
        match known {
            Some(known) if known.at <= signal.at => return false,
            Some(known) => known.at = signal.at,
            None => self.0.push(signal),
        }
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
    /// A guest that runs on the source again wins over every sign of the target: QEMU announces the
    /// target before the source has let go, and libvirt resumes the source only once the target is
    /// dead.
    pub fn guest(&self) -> GuestPlace {
        let seen = |kind| self.first(kind).is_some();
        if seen(SignalKind::ResumedOnSource) {
            GuestPlace::BackOnSource
        } else if seen(SignalKind::ResumedOnTarget) {
            GuestPlace::Target
        } else if seen(SignalKind::Paused) {
            GuestPlace::InTransit
        } else {
            GuestPlace::Source
        }
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
