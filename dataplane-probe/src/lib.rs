//! Measures what the peers of a machine see: loss, duplicates, reordering and gaps, each direction on its own.
//!
//! A [reflector](reflect) runs in the machine, a [client](run) beside it; between them go UDP packets at a fixed rate
//! both ways, one long TCP stream, and new TCP connections. The result is a [report]. A third part, [watch], tells
//! when a machine's first frame appears on an interface.
//!
//! Made for live migration of virtual machines, where the clock of one side stands still now and then: gaps are taken
//! on the client's clock alone, losses from sequence numbers. Linux only.

pub mod clock;
pub mod control;
pub mod gaps;
pub mod ledger;
pub mod pace;
pub mod packets;
pub mod reflect;
pub mod remote;
pub mod report;
pub mod run;
mod sys;
pub mod table;
pub mod watch;
pub mod wire;
