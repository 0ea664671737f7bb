//! The decisions of a network handover, free of I/O.
//!
//! A *handover* moves the OVN ports of one virtual machine from the chassis it leaves (the
//! *source*) to the chassis it migrates to (the *target*), for one migration. This crate holds
//! what must be right whatever crashes: given everything that is [observed](Observed) now,
//! [`decide`] says which phase the handover is in and which single write comes next.
//!
//! # Guarantees
//!
//! * **Level-triggered.** A decision depends on the observation alone, never on having seen an
//!   event. Whoever restarts between any two writes carries on from what it finds.
//! * **Idempotent.** Once a decision's write is in effect, the same observation with that write
//!   applied asks for nothing more of it.
//! * **Fenced.** Every [`Write`] carries the values it was decided on ([`Expected`]) and is refused
//!   ([`PortWrite::check`]) when the row has moved on or belongs to a newer [`Epoch`].
//! * **Convergent.** From every reachable state, with a migration that ends, the port ends up
//!   requested and bound where the guest runs and nowhere else, with no mark left behind, and every
//!   route that depends on where the guest is leads there.
//!
//! The property tests in `tests/` hold the crate to the last three against a model of OVN and of
//! KubeVirt that crashes, delays, reorders and cancels.
//!
//! # Caveats
//!
//! The crate trusts its observation. An observer that mixes ports of two moments, or reports a
//! chassis under two names, gets decisions for a world that never was: the guards then refuse the
//! write, and the next observation mends it.

mod decide;
mod flip;
mod gate;
mod identity;
mod mark;
mod mend;
mod observed;
mod phase;
mod place;
mod signal;
mod write;

#[cfg(test)]
mod model;

pub use decide::{Decision, decide, has_moved};
pub use flip::{FlipPolicy, FlipTiming, Route, RouteWrite};
pub use gate::{Answer, GatePolicy, Network, OnTimeout, Verdict, answer};
pub use identity::{Chassis, Epoch, MigrationUid, PortName, RouteKey, Timestamp, VmName};
pub use mark::{Mark, MarkError, Original};
pub use observed::{
    Barrier, Binding, Deadlines, Earlier, Identity, Newer, Observed, Outcome, Port, PortConfig,
    Side, Since,
};
pub use phase::{Phase, Waiting};
pub use place::{SourceWords, source};
pub use signal::{GuestPlace, Sighting, Signal, SignalKind, SignalSource, Signals};
pub use write::{Expected, PortWrite, Refusal, Step, Write};

/// The activation strategy a handover asks OVN for: the target chassis drops the port's traffic in
/// both directions until the guest announces itself with a RARP frame.
///
/// `rarp` is the one that every OVN with multi-chassis ports has (22.06.1); `garp` and `na` came
/// with 25.09. Source: ovn-nb(5), `options:activation-strategy`.
pub const ACTIVATION_STRATEGY: &str = "rarp";
