//! OVN's databases: what handovers read of them, and how they write.

mod owner;
mod replica;
mod tables;
mod writer;

pub(crate) use owner::Owners;
pub(crate) use replica::{Databases, PortRow, View};
pub(crate) use tables::{Chassis, ChassisPrivate, LogicalSwitchPort, NbGlobal, PortBinding};
pub(crate) use writer::{Writer, Written, read_config};

#[cfg(test)]
mod server;
#[cfg(test)]
mod tests;
