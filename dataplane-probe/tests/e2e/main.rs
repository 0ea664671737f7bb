//! The program and the library as a whole.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

mod command_line;
mod loopback;
mod namespaces;
mod support;
