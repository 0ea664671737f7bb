//! JSON-RPC 1.0 over a stream (RFC 7047, section 4): how bytes become messages.

pub(crate) mod frame;
pub(crate) mod message;

pub use frame::{FrameDecoder, FrameError};
