//! The columns that handovers read. Source: ovn-nb(5), ovn-sb(5).

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

/// The Northbound database's name.
pub(crate) const NORTHBOUND: &str = "OVN_Northbound";
/// The Southbound database's name.
pub(crate) const SOUTHBOUND: &str = "OVN_Southbound";

ovsdb_rs::table! {
    /// A port of a logical switch.
    #[derive(Eq)]
    pub(crate) struct LogicalSwitchPort in "Logical_Switch_Port" {
        pub(crate) name: String,
        pub(crate) r#type: String,
        pub(crate) addresses: Vec<String>,
        pub(crate) options: BTreeMap<String, String>,
        pub(crate) external_ids: BTreeMap<String, String>,
    }

    /// A logical switch.
    #[derive(Eq)]
    pub(crate) struct LogicalSwitch in "Logical_Switch" {
        pub(crate) name: String,
        pub(crate) ports: BTreeSet<Uuid>,
        pub(crate) external_ids: BTreeMap<String, String>,
    }

    /// A logical router.
    #[derive(Eq)]
    pub(crate) struct LogicalRouter in "Logical_Router" {
        pub(crate) name: String,
        pub(crate) ports: BTreeSet<Uuid>,
        pub(crate) policies: BTreeSet<Uuid>,
        pub(crate) static_routes: BTreeSet<Uuid>,
        pub(crate) options: BTreeMap<String, String>,
    }

    /// A port of a logical router.
    #[derive(Eq)]
    pub(crate) struct LogicalRouterPort in "Logical_Router_Port" {
        pub(crate) name: String,
        pub(crate) networks: Vec<String>,
    }

    /// A routing policy.
    #[derive(Eq)]
    pub(crate) struct LogicalRouterPolicy in "Logical_Router_Policy" {
        pub(crate) priority: i64,
        pub(crate) r#match: String,
        pub(crate) action: String,
        pub(crate) nexthops: Vec<String>,
    }

    /// A static route.
    #[derive(Eq)]
    pub(crate) struct LogicalRouterStaticRoute in "Logical_Router_Static_Route" {
        pub(crate) ip_prefix: String,
        pub(crate) policy: Option<String>,
        pub(crate) output_port: Option<String>,
    }

    /// A named set of addresses.
    #[derive(Eq)]
    pub(crate) struct AddressSet in "Address_Set" {
        pub(crate) name: String,
        pub(crate) addresses: BTreeSet<String>,
        pub(crate) external_ids: BTreeMap<String, String>,
    }

    /// The one row about the Northbound as a whole.
    #[derive(Eq)]
    pub(crate) struct NbGlobal in "NB_Global" {
        pub(crate) nb_cfg: i64,
    }

    /// Where a port is bound.
    #[derive(Eq)]
    pub(crate) struct PortBinding in "Port_Binding" {
        pub(crate) logical_port: String,
        pub(crate) chassis: Option<Uuid>,
        pub(crate) additional_chassis: Vec<Uuid>,
        pub(crate) options: BTreeMap<String, String>,
    }

    /// A hypervisor.
    #[derive(Eq)]
    pub(crate) struct Chassis in "Chassis" {
        pub(crate) name: String,
        pub(crate) hostname: String,
        pub(crate) other_config: BTreeMap<String, String>,
    }

    /// How far a hypervisor has followed.
    #[derive(Eq)]
    pub(crate) struct ChassisPrivate in "Chassis_Private" {
        pub(crate) name: String,
        pub(crate) chassis: Option<Uuid>,
        pub(crate) nb_cfg: i64,
    }
}

impl LogicalRouter {
    /// Whether it is the same as far as the network's layout goes.
    pub(crate) fn is_same_node(&self, other: &Self) -> bool {
        self.name == other.name && self.ports == other.ports && self.options == other.options
    }
}

impl Chassis {
    /// Whether it belongs to another zone's interconnection. Such a chassis follows its own
    /// Northbound, never this one.
    pub(crate) fn is_remote(&self) -> bool {
        self.other_config
            .get("is-remote")
            .is_some_and(|value| value == "true")
    }
}
