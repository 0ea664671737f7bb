//! How long things take in a cluster that take no time here.

use std::time::Duration;

/// What is added to the time that the real API and the real domains take anyway.
///
/// The defaults are those of a cluster that is not under load. Sources: KubeVirt 1.9's code where a file is named;
/// an estimate where it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delays {
    /// From a pod's creation to its binding. Seen beside the real virt-controller: 58 ms, and phase Scheduling, in which
    /// the pod has no node yet, 26 ms after the creation.
    pub scheduling: Duration,
    /// From a pod's binding to its sandbox (CNI ADD). An estimate, as is [`Delays::containers`]: Kubernetes' own
    /// objective for both together, images present, is 5 s for 99 of 100 pods (SIG Scalability, "Pod startup
    /// latency"); an idle node takes one to two.
    pub sandbox: Duration,
    /// From the sandbox to running containers.
    pub containers: Duration,
    /// From the handed-over target pod to a published address. virt-handler looks for its migration proxy's
    /// listeners once a second (`pkg/virt-handler/migration-target.go`).
    pub target_preparation: Duration,
    /// From a change of a domain to virt-handler's knowing: libvirt's event, virt-launcher's notification, informer
    /// and queue. An estimate: 30–500 ms.
    pub domain_notification: Duration,
    /// From the domain-ready timestamp in the VMI to the target pod's annotation, which virt-controller writes. Seen
    /// beside the real one: 35 ms, of which the API and the queue here take some.
    pub ready_annotation: Duration,
    /// From the end of the copy to its acknowledgement (`endTimestamp`, `nodeName`). An estimate: 0.2 s to many.
    pub completion: Duration,
    /// From a domain's end to that of its virt-launcher, which looks once a second (`pkg/virt-launcher/monitor.go`).
    pub launcher_exit: Duration,
    /// From the end of a pod's containers to CNI DEL. An estimate: kubelet relists containers once a second, or is
    /// told by the runtime.
    pub sandbox_teardown: Duration,
}

impl Default for Delays {
    fn default() -> Self {
        Self {
            scheduling: Duration::from_millis(50),
            sandbox: Duration::from_millis(500),
            containers: Duration::from_millis(500),
            target_preparation: Duration::from_secs(1),
            domain_notification: Duration::from_millis(200),
            ready_annotation: Duration::from_millis(30),
            completion: Duration::from_millis(300),
            launcher_exit: Duration::from_secs(1),
            sandbox_teardown: Duration::from_millis(300),
        }
    }
}

impl Delays {
    /// Nothing is waited for but the API and the domains.
    pub const NONE: Self = Self {
        scheduling: Duration::ZERO,
        sandbox: Duration::ZERO,
        containers: Duration::ZERO,
        target_preparation: Duration::ZERO,
        domain_notification: Duration::ZERO,
        ready_annotation: Duration::ZERO,
        completion: Duration::ZERO,
        launcher_exit: Duration::ZERO,
        sandbox_teardown: Duration::ZERO,
    };
}
