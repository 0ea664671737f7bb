//! OVN's databases: what handovers read of them, and how they write.

mod news;
mod owner;
mod pair;
mod places;
mod replica;
mod routed;
mod statics;
mod tables;
mod writer;

pub(crate) use owner::Owners;
pub(crate) use pair::{Pairs, Target, ends, is_counterpart, shown};
pub(crate) use places::{PlaceSets, Places};
pub(crate) use replica::{Databases, PortRow, View};
pub(crate) use statics::StaticRoutes;
pub(crate) use tables::{
    AddressSet, Chassis, ChassisPrivate, LogicalRouter, LogicalRouterPolicy, LogicalRouterPort,
    LogicalRouterStaticRoute, LogicalSwitch, LogicalSwitchPort, NbGlobal, PortBinding,
};
pub(crate) use writer::{
    Basis, Mismatch, WRITER_LOCK, Writer, Written, guards, obstacle, read_config,
};

#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;
