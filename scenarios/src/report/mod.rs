//! What a run of a scenario measured: `segue.report/v2`.
//!
//! Times are counted from the guest's pause, in microseconds, by the lab machine's clock: every
//! node of the lab is a namespace of that machine, so there is one clock. Durations are in
//! milliseconds. Absent steps and figures are null.

mod baseline;
mod figures;
mod flows;
mod losses;
mod opening;
#[cfg(test)]
pub(crate) mod samples;
mod table;

use serde::{Deserialize, Serialize};

use crate::scenario::{Outcome, Topology};

pub use baseline::{Baseline, Refused};
pub use figures::{Direction, Interruption, NewConnections, Pause, Tcp, network_added_ms};
pub use flows::{Flow, Forbidden, GatewayEntry, Tried};
pub use losses::Losses;
pub(crate) use losses::Places;
pub use opening::EarlyOpening;
pub use table::render;

/// The name and version of the format. Within it fields are only ever added.
pub const SCHEMA: &str = "segue.report/v2";

/// One scenario's run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// Name of the scenario.
    pub scenario: String,
    /// Whether every check held.
    pub passed: bool,
    /// What it ran on.
    pub environment: Environment,
    /// Packets a second, each way, over all flows of a VM together; 0 where it came to none.
    #[serde(default)]
    pub rate_hz: u32,
    /// What the first guest of the lab carried without a migration; null where none came so far.
    #[serde(default)]
    pub baseline: Option<Baseline>,
    /// How often the scenario was run: a second time, at half the rate, where the first run was invalid. What is reported
    /// is the last.
    #[serde(default)]
    pub attempts: u32,
    /// Why the first run was invalid.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repeated_because: Vec<String>,
    /// The migrations, in the order they began.
    pub migrations: Vec<Migration>,
    /// Measurements without a migration.
    pub measurements: Vec<Measurement>,
    /// What was checked, in order.
    pub checks: Vec<Check>,
}

/// What a run ran on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of OVN.
    pub ovn: String,
    /// Version of Open vSwitch.
    pub ovs: String,
    /// Version of QEMU.
    pub qemu: String,
    /// Version of libvirt.
    pub libvirt: String,
    /// Version of the Kubernetes API server.
    pub kubernetes: String,
    /// `tcg` (software emulation) or `kvm`.
    pub accel: String,
    /// Processors of the machine.
    pub cpus: usize,
    /// Kernel release of the machine.
    pub kernel: String,
}

/// One migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// `namespace/name` of the VM.
    pub vm: String,
    /// Node it left.
    pub source: String,
    /// Node it went to.
    pub target: String,
    /// How its network is laid out.
    pub topology: Topology,
    /// Who handed it over.
    pub strategy: String,
    /// How the handover ended.
    pub outcome: Outcome,
    /// When what happened.
    pub timeline_us: Timeline,
    /// STOP on the source to RESUME, from QEMU's own events.
    pub pause_ms: Option<f64>,
    /// RESUME to the guest's first frame on the target's tap.
    pub guest_wake_ms: Option<f64>,
    /// From the last packet that the guest sent to STOP. QEMU passes no frames for the last moments before it says so, and
    /// a guest that has little of its processor is behind: what comes for it meanwhile is in its tap at the source, and
    /// nobody reads it any more. Null without a pause.
    #[serde(default)]
    pub silent_before_pause_ms: Option<f64>,
    /// The longest service gap of either direction around the pause, less pause and guest wake; from the
    /// VM, the wake lasts until the probe's first packet. Not clamped.
    pub network_added_ms: Option<f64>,
    /// By how much `network_added_ms` may be off in either direction.
    pub network_added_error_ms: Option<f64>,
    /// How agents opened the target's ports on the pause; absent where nobody told of the pause in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_opening: Option<EarlyOpening>,
    /// How long virt-handler's question held the copy back, from when it was asked first. Null where nobody is asked.
    #[serde(default)]
    pub gate_held_ms: Option<f64>,
    /// Packets towards the VM.
    pub to_vm: Direction,
    /// Packets from the VM.
    pub from_vm: Direction,
    /// The long TCP stream.
    pub tcp: Tcp,
    /// New TCP connections.
    pub new_connections: NewConnections,
    /// Every flow that was watched, the primary one first.
    #[serde(default)]
    pub flows: Vec<Flow>,
    /// Flows that must not pass, and how they fared.
    #[serde(default)]
    pub forbidden: Vec<Forbidden>,
    /// The guest's entries for its gateway; empty in the shared topology, where it has none.
    #[serde(default)]
    pub gateway: Vec<GatewayEntry>,
    /// Why the figures are not the network's: the guest or the client did not keep up. Empty when valid.
    pub invalid: Vec<String>,
}

/// When what happened, in microseconds from the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Both chassis were requested (T1).
    pub armed: Option<i64>,
    /// The target and the chassis that matter had caught up.
    pub ready: Option<i64>,
    /// The copy of the guest's memory began.
    #[serde(default)]
    pub copying: Option<i64>,
    /// The guest paused on the source; 0 by definition.
    pub paused: Option<i64>,
    /// The target's agent had written what opens the port.
    #[serde(default)]
    pub opened: Option<i64>,
    /// The target's ovn-controller activated the port, as the Southbound tells; an agent has opened it before.
    pub activated: Option<i64>,
    /// The guest resumed.
    pub resumed: Option<i64>,
    /// The guest's first frame on the target's tap.
    pub guest_first_frame: Option<i64>,
    /// The VM's outside traffic was given the target's gateway (T2); null in the shared topology, which
    /// has nothing to flip.
    pub flipped: Option<i64>,
    /// The port was bound where the guest runs and bore no mark.
    pub finalised: Option<i64>,
}

/// A measurement without a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What was measured.
    pub what: String,
    /// `namespace/name` of the VM.
    pub vm: String,
    /// Packets towards the VM.
    pub to_vm: Direction,
    /// Packets from the VM.
    pub from_vm: Direction,
    /// The long TCP stream.
    pub tcp: Tcp,
    /// New TCP connections.
    pub new_connections: NewConnections,
    /// Every flow that was watched, the primary one first.
    #[serde(default)]
    pub flows: Vec<Flow>,
    /// Flows that must not pass, and how they fared.
    #[serde(default)]
    pub forbidden: Vec<Forbidden>,
    /// Why the figures are not the network's. Empty when valid.
    pub invalid: Vec<String>,
}

/// Something that had to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What, in a sentence.
    pub what: String,
    /// What was found where it did not hold.
    pub failure: Option<String>,
}

impl Report {
    /// Why the run is invalid, by VM; empty when it is valid.
    pub fn invalid(&self) -> Vec<String> {
        let migrations = self.migrations.iter();
        let migrations = migrations.map(|migration| (&migration.vm, &migration.invalid));
        let measurements = self.measurements.iter();
        let measurements = measurements.map(|measured| (&measured.vm, &measured.invalid));
        let all = migrations.chain(measurements);
        all.flat_map(|(vm, reasons)| reasons.iter().map(move |reason| format!("{vm}: {reason}")))
            .collect()
    }
}

impl Check {
    /// Whether it held.
    pub fn held(&self) -> bool {
        self.failure.is_none()
    }
}
