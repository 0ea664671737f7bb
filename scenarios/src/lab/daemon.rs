//! The daemons of a lab and how each is started.

use std::fmt;

use super::host::Role;

/// The port of the Northbound database on central.
pub(crate) const NB_PORT: u16 = 6641;
/// The port of the Southbound database on central.
pub(crate) const SB_PORT: u16 = 6642;

/// A daemon of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Daemon {
    /// Serves OVN's Northbound database, on central.
    NbDb,
    /// Serves OVN's Southbound database, on central.
    SbDb,
    /// Translates Northbound to Southbound, on central.
    Northd,
    /// Serves Open vSwitch's own database, on a node.
    OvsDb,
    /// The switch, on a node.
    Vswitchd,
    /// Makes the Southbound database true on a node.
    OvnController,
    /// Runs guests, on a node.
    Libvirtd,
}

impl Daemon {
    /// The daemons of a role, in the order in which they start.
    pub(crate) fn of(role: Role) -> &'static [Self] {
        match role {
            Role::Central => &[Self::NbDb, Self::SbDb, Self::Northd],
            Role::Node => &[
                Self::OvsDb,
                Self::Vswitchd,
                Self::OvnController,
                Self::Libvirtd,
            ],
            Role::Client | Role::Outside => &[],
        }
    }

    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::NbDb | Self::SbDb | Self::OvsDb => "ovsdb-server",
            Self::Northd => "ovn-northd",
            Self::Vswitchd => "ovs-vswitchd",
            Self::OvnController => "ovn-controller",
            Self::Libvirtd => "libvirtd",
        }
    }

    /// An argument that tells daemons of one program apart.
    pub(crate) fn mark(self) -> Option<&'static str> {
        match self {
            Self::NbDb => Some("/var/lib/ovn/ovnnb_db.db"),
            Self::SbDb => Some("/var/lib/ovn/ovnsb_db.db"),
            Self::OvsDb => Some("/etc/openvswitch/conf.db"),
            Self::Northd | Self::Vswitchd | Self::OvnController | Self::Libvirtd => None,
        }
    }

    /// Program and arguments. Every one of them detaches, and the command ends when the daemon serves. Sockets and
    /// process files are where the distribution has them, so that `ovn-nbctl show` and the like work without options.
    pub(crate) fn command_line(self) -> (&'static str, Vec<String>) {
        let mut args: Vec<String> = match self {
            Self::NbDb => database("ovn", "ovnnb_db", Some(NB_PORT), "/var/lib/ovn/ovnnb_db.db"),
            Self::SbDb => database("ovn", "ovnsb_db", Some(SB_PORT), "/var/lib/ovn/ovnsb_db.db"),
            Self::OvsDb => database("openvswitch", "db", None, "/etc/openvswitch/conf.db"),
            Self::Northd => vec![
                "--ovnnb-db=unix:/run/ovn/ovnnb_db.sock".into(),
                "--ovnsb-db=unix:/run/ovn/ovnsb_db.sock".into(),
            ],
            Self::Vswitchd | Self::OvnController => vec!["unix:/run/openvswitch/db.sock".into()],
            Self::Libvirtd => {
                return (
                    self.program(),
                    ["--daemon", "--listen"].map(String::from).into(),
                );
            }
        };
        let (logs, file) = match self {
            Self::OvsDb | Self::Vswitchd => ("openvswitch", self.program()),
            Self::NbDb => ("ovn", "ovsdb-server-nb"),
            Self::SbDb => ("ovn", "ovsdb-server-sb"),
            _ => ("ovn", self.program()),
        };
        // As Debian starts them, with a process that restarts them after a fault of their own (daemon(7ovs)): OVN 23.03's
        // controller has one in a good tenth of its starts. A daemon that is killed stays dead.
        args.extend(["--detach", "--monitor", "--no-chdir", "-vconsole:off"].map(String::from));
        args.push(format!("--pidfile=/run/{logs}/{file}.pid"));
        args.push(format!("--log-file=/var/log/{logs}/{file}.log"));
        (self.program(), args)
    }
}

fn database(run: &str, socket: &str, port: Option<u16>, file: &str) -> Vec<String> {
    let mut args = vec![
        format!("--remote=punix:/run/{run}/{socket}.sock"),
        file.to_owned(),
    ];
    args.extend(port.map(|port| format!("--remote=ptcp:{port}:0.0.0.0")));
    if run == "ovn" {
        args.push(format!("--unixctl=/run/{run}/{socket}.ctl"));
    }
    args
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NbDb => "ovsdb-server (NB)",
            Self::SbDb => "ovsdb-server (SB)",
            Self::OvsDb => "ovsdb-server",
            _ => self.program(),
        })
    }
}
