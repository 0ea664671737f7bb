//! The routed topology: found in the Northbound, and the rows that segue keeps there for it. What
//! they are for is in `docs/routed.md`.

mod address;
mod keeper;
pub(crate) mod names;
mod standing;
mod sweep;
mod topology;

pub(crate) use address::{Family, Network, host, port_addresses};
pub(crate) use keeper::{Alarms, Keeper};
pub(crate) use topology::{Layout, Topology};

#[cfg(test)]
pub(crate) mod tests;
