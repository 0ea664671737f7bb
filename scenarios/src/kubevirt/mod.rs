//! A stand-in for virt-controller, virt-handler and kubelet. Nothing else of a cluster is one.
//!
//! Three roles walk the real API objects through KubeVirt's real states, in its order and with its delays, while a
//! [`Hypervisor`] runs the real domains. Each role sees the others through the API and the nodes alone, acts on what
//! it reads and not on what it remembers, and can be switched off and on again at any moment, so that the real
//! component can take its place.
//!
//! | role | does |
//! | --- | --- |
//! | [`Role::VirtController`] | VMI → launcher pod → hand-over to its node; migration phases, target pod, hand-over, cancellation, limits, the target pod's ready annotation |
//! | [`Role::VirtHandler`] | starts domains, prepares targets, starts and aborts copies, reports them in `migrationState`, moves `nodeName` |
//! | [`Role::Kubelet`] | Node objects, scheduling, CNI ADD and DEL, pod status |
//!
//! The process in a launcher pod is none of the three: a copy goes on while virt-handler is off, as it does in a
//! cluster.
//!
//! # A migration, in writes
//! 1. migration `Pending`, with the source pod in the same write.
//! 2. Target pod, with all labels of the VMI (`kubevirt.io/nodeName` names the **source**) and the migration's UID.
//! 3. `Scheduling`, before the pod has a node; then, when it runs, `Scheduled`.
//! 4. VMI: a fresh `migrationState` with source, target and configuration, label `kubevirt.io/migrationTargetNodeName`.
//! 5. `PreparingTarget`. VMI: `targetNodeAddress` and ports. `TargetReady`.
//! 6. Plugins' node hooks `PreMigrationSource` agree. The copy starts. VMI: `startTimestamp`, `mode`. `Running`. VMI: `targetNodeDomainDetected`.
//! 7. The domain runs on the target. VMI: `targetNodeDomainReadyTimestamp`; target pod: its annotation.
//! 8. VMI: `endTimestamp`, `nodeName`, label `kubevirt.io/nodeName`; then `completed`; the target's label goes.
//! 9. `Succeeded`, with the VMI's `migrationState`; the source pod completes, then CNI DEL; the target pod's
//!    `kubevirt.io/nodeName` is corrected.
//!
//! A failure: VMI `failed`, `completed`, `endTimestamp`, `failureReason` (after an abort `abortStatus`, too); `Failed`;
//! the target pod completes, then CNI DEL.
//!
//! # What is left out
//! Plugins' other hooks and conditions, post-copy, hot-plugged volumes, migrations between clusters, persistent TPM and EFI
//! state, evacuation (whoever evacuates makes a migration), and what drives `VirtualMachine`s: VMIs are made directly.

mod api;
mod context;
mod controller;
mod delays;
mod error;
mod handler;
mod hypervisor;
mod kubelet;
mod launcher;
mod nic;
mod plugins;
mod roles;
mod template;

pub use api::{
    Condition, Devices, DomainSpec, Interface, MigrationState, Multus, Network, PhaseTransition,
    Unknown, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase, VmiSpec, VmiStatus,
    VmimPhase, VmimSpec, VmimStatus, names, virtual_machine,
};
pub use controller::Limits;
pub use delays::Delays;
pub use error::Error;
pub use hypervisor::{BoxError, DomainEvent, DomainState, Hypervisor, Machine, Migration, Sandbox};
pub use kubelet::NodeSpec;
pub use nic::{Nic, PORTS_ANNOTATION, Port, nics};
pub use plugins::{HookCall, HookPoint, HookResult, NodeHook, Plugin, PluginSpec};
pub use roles::{KubeVirt, Role, Settings};
