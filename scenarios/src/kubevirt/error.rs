//! What keeps a role from doing its work; it tries again.

use super::BoxError;

/// Why a role could not do what an object asks for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A VMI is not one that the lab can run.
    #[error("VMI {vmi}: {reason}")]
    Vmi {
        /// `<namespace>/<name>`.
        vmi: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The API refused or failed a request.
    #[error("{doing}")]
    Api {
        /// What was asked for.
        doing: String,
        /// What the API answered.
        source: Box<kube::Error>,
    },
    /// The hypervisor failed.
    #[error("{doing}")]
    Hypervisor {
        /// What was asked for.
        doing: String,
        /// What it complained of.
        source: BoxError,
    },
    /// A plugin's hook failed.
    #[error("{doing}")]
    Plugin {
        /// Which.
        doing: String,
        /// Why.
        source: BoxError,
    },
}

impl Error {
    pub(super) fn api(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Api {
            doing,
            source: Box::new(source),
        }
    }

    pub(super) fn hypervisor(doing: impl Into<String>) -> impl FnOnce(BoxError) -> Self {
        let doing = doing.into();
        move |source| Self::Hypervisor { doing, source }
    }

    /// The message with that of its cause, for a log or an Event.
    pub(super) fn with_cause(&self) -> String {
        match std::error::Error::source(self) {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }

    /// Somebody else wrote the object first: 409 for an update, 422 for a JSON patch whose test failed. Reading it
    /// again is all that it takes.
    pub(super) fn is_conflict(&self) -> bool {
        match self {
            Self::Api { source, .. } => {
                matches!(&**source, kube::Error::Api(status) if matches!(status.code, 409 | 422))
            }
            Self::Vmi { .. } | Self::Hypervisor { .. } | Self::Plugin { .. } => false,
        }
    }
}
