//! A real Kubernetes API for the lab: etcd, kube-apiserver with RBAC, and kubectl.
//!
//! Nothing else of Kubernetes runs. Two consequences are worth knowing: without the namespace controller a deleted
//! namespace stays in `Terminating`, and without the garbage collector an object outlives its owner.
//!
//! ```no_run
//! # async fn example() -> Result<(), scenarios::kubernetes::Error> {
//! use scenarios::kubernetes::{Assets, ControlPlane, Port, Settings, here};
//!
//! let plane = ControlPlane::start(
//!     Settings {
//!         assets: Assets::find()?,
//!         directory: "/run/lab/kubernetes".into(),
//!         address: [127, 0, 0, 1].into(),
//!         port: Port::Free,
//!     },
//!     &here(),
//! )
//! .await?;
//! plane.apply_kubevirt_crds().await?;
//! plane.kubectl().apply_kustomization("manifests".as_ref()).await?;
//! let kubeconfig = plane.kubeconfig_of_service_account("segue-system", "migration-controller").await?;
//! plane.stop().await
//! # }
//! ```

mod access;
mod assets;
mod credentials;
mod error;
mod install;
mod process;
mod server;

pub(crate) use access::client as client_of_kubeconfig;
pub use assets::Assets;
pub use error::Error;
pub use install::Kubectl;
pub use process::{Spawner, here};
pub use server::{ControlPlane, Port, Settings};
