//! The columns that handovers read. Source: ovn-nb(5), ovn-sb(5).

use std::collections::BTreeMap;

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
        pub(crate) options: BTreeMap<String, String>,
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

impl Chassis {
    /// Whether it belongs to another zone's interconnection. Such a chassis follows its own
    /// Northbound, never this one.
    pub(crate) fn is_remote(&self) -> bool {
        self.other_config
            .get("is-remote")
            .is_some_and(|value| value == "true")
    }
}
