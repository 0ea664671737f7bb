//! Routes, proxy neighbours and announcements in namespaces of the tests' own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

mod kernel;
mod support;
