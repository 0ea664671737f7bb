//! The writes to the Northbound: each one a transaction of its own, of whole columns, without a guard.

use std::collections::{BTreeMap, BTreeSet};

use ovsdb_rs::{Condition, Datum, Mutation, Row, Transaction};
use uuid::Uuid;

const PORTS: &str = "Logical_Switch_Port";
const SWITCHES: &str = "Logical_Switch";
const GROUPS: &str = "Port_Group";

/// One transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Write {
    /// Makes a port on a switch (`CreateLogicalSwitchPortOp`).
    Create { switch: String, columns: Columns },
    /// Replaces the columns of a port (`CreateLogicalSwitchPort` where it is there): all but `options`.
    Replace { port: Uuid, columns: Columns },
    /// Replaces `options` (`UpdateLogicalSwitchPort`).
    Options {
        port: Uuid,
        options: BTreeMap<String, String>,
    },
    /// Deletes a port (`DeleteLogicalSwitchPort`).
    Delete { port: Uuid },
    /// Makes a port group (`CreatePortGroup`).
    CreateGroup {
        name: String,
        external_ids: BTreeMap<String, String>,
    },
    /// Adds ports to port groups and removes them from others (`portGroupUpdatePortOp`).
    Groups(Vec<Membership>),
}

/// The columns of a port that are replaced together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) name: String,
    pub(super) addresses: String,
    pub(super) port_security: Option<String>,
    pub(super) external_ids: BTreeMap<String, String>,
}

/// A change of a port group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Membership {
    Join(String, BTreeSet<Uuid>),
    Leave(String, BTreeSet<Uuid>),
}

impl Write {
    /// As a transaction of the Northbound.
    pub(super) fn transaction(&self) -> Transaction {
        let mut tx = Transaction::new();
        match self {
            Self::Create { switch, columns } => {
                let row = columns.row().set("name", columns.name.as_str());
                let made = tx.insert(PORTS, row);
                let joins = [Mutation::insert("ports", Datum::set([made.reference()]))];
                tx.mutate(SWITCHES, Condition::eq("name", switch.as_str()), joins);
            }
            Self::Replace { port, columns } => {
                tx.update(PORTS, Condition::uuid(*port), columns.row());
            }
            Self::Options { port, options } => {
                let row = Row::new().set("options", options.clone());
                tx.update(PORTS, Condition::uuid(*port), row);
            }
            Self::Delete { port } => {
                // Nothing else refers to it strongly: off its switch it is gone.
                let having = Condition::includes("ports", Datum::set([*port]));
                let leaves = [Mutation::delete("ports", Datum::set([*port]))];
                tx.mutate(SWITCHES, having, leaves);
            }
            Self::CreateGroup { name, external_ids } => {
                let row = Row::new().set("name", name.as_str());
                tx.insert(GROUPS, row.set("external_ids", external_ids.clone()));
            }
            Self::Groups(changes) => {
                for change in changes {
                    let (group, mutation) = match change {
                        Membership::Join(group, ports) => {
                            (group, Mutation::insert("ports", set(ports)))
                        }
                        Membership::Leave(group, ports) => {
                            (group, Mutation::delete("ports", set(ports)))
                        }
                    };
                    tx.mutate(GROUPS, Condition::eq("name", group.as_str()), [mutation]);
                }
            }
        }
        tx
    }
}

impl Columns {
    fn row(&self) -> Row {
        Row::new()
            .set("addresses", Datum::set([self.addresses.as_str()]))
            .set(
                "port_security",
                Datum::set(self.port_security.iter().map(String::as_str)),
            )
            .set("external_ids", self.external_ids.clone())
            .set("dhcpv4_options", Datum::empty())
            .set("dhcpv6_options", Datum::empty())
    }
}

fn set(ports: &BTreeSet<Uuid>) -> Datum {
    Datum::set(ports.iter().copied())
}
