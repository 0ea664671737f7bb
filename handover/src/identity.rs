//! Who and what a handover is about.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! text_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Takes the text as it is; what is valid is the origin's business.
            pub fn new(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_newtype! {
    /// `metadata.uid` of a VirtualMachineInstanceMigration: what tells two migrations of one VM apart.
    MigrationUid
}

text_newtype! {
    /// The name of a Logical_Switch_Port, which the Southbound calls its `logical_port`.
    PortName
}

text_newtype! {
    /// What leads traffic to a VM, or from it, by where the VM is: one of its addresses, or the prefix
    /// of a static route to it.
    RouteKey
}

/// A virtual machine by Kubernetes namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmName {
    /// Namespace.
    pub namespace: String,
    /// Name of the VirtualMachineInstance.
    pub name: String,
}

impl VmName {
    /// The VM `name` in `namespace`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A chassis as the Southbound knows it.
///
/// `requested-chassis` accepts either of the two names (ovn-nb(5)), so both are kept: a value that
/// somebody else wrote is recognised in either form and answered in the form they chose.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Chassis {
    /// `Chassis.name`, the `system-id` of its Open vSwitch.
    pub name: String,
    /// `Chassis.hostname`; empty where the chassis reports none.
    pub hostname: String,
}

impl Chassis {
    /// A chassis by both its names.
    pub fn new(name: impl Into<String>, hostname: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            hostname: hostname.into(),
        }
    }

    /// Whether `text`, one element of a `requested-chassis` list, means this chassis.
    pub fn is_named_by(&self, text: &str) -> bool {
        text == self.name || (!self.hostname.is_empty() && text == self.hostname)
    }
}

impl fmt::Display for Chassis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Grows with every handover of a port; a writer with a smaller one is fenced.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a new handover: above every one that is `known` for the VM's ports, and no
    /// lower than the second the migration was `created` (Unix time).
    ///
    /// The creation time alone would do but for clocks that step back; the known epochs alone would
    /// do but for records that are collected.
    pub fn next(created: u64, known: impl IntoIterator<Item = Self>) -> Self {
        let above = known
            .into_iter()
            .max()
            .map_or(0, |highest| highest.0.saturating_add(1));
        Self(created.max(above))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Wall-clock time, in milliseconds of Unix time.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The moment `duration` later.
    #[must_use]
    pub fn after(self, duration: std::time::Duration) -> Self {
        let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(millis))
    }
}
