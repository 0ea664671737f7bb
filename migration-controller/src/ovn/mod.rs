//! OVN's databases: what handovers read of them, and how they write.

mod news;
mod owner;
mod places;
mod replica;
mod routed;
mod tables;
mod writer;

pub(crate) use owner::Owners;
pub(crate) use places::{PlaceSets, Places};
pub(crate) use replica::{Databases, PortRow, View};
pub(crate) use tables::{
    AddressSet, Chassis, ChassisPrivate, LogicalRouter, LogicalRouterPolicy, LogicalRouterPort,
    LogicalSwitch, LogicalSwitchPort, NbGlobal, PortBinding,
};
pub(crate) use writer::{Mismatch, WRITER_LOCK, Writer, Written, guards, read_config};

#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;
