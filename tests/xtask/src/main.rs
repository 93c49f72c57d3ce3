//! `cargo xtask`: builds what plain cargo can't, brings a cluster up, and runs every check.

mod artifacts;
mod checks;
mod deadline;
mod ebpf;
mod facts;
mod fuzz;
mod images;
mod layers;
mod machine;
mod musl;
mod steps;
mod up;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, run and check weft")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, build, and bring up a cluster with a sample application
    Up,
    /// Stop the cluster that `up` started, and remove it
    Down,
    /// Build the binary with everything it carries into target/artifacts
    Build {
        /// Build `weft` without optimisation
        #[arg(long)]
        dev: bool,
    },
    /// Run all tests and say what was skipped and why
    Test {
        /// Further arguments for cargo test
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Everything that a change must pass: format, clippy, layers, docs, and all tests with no skip allowed
    Ci,
    /// Build the eBPF programs into target/artifacts
    Ebpf,
    /// Build the images of sample and tests into target/images
    Images,
    /// Measure against peers and floors
    Bench {
        /// Further arguments for the benchmark
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fuzz what reads foreign input, led by coverage (libFuzzer); all targets if none is named
    Fuzz {
        /// The target: a folder of tests/fuzz/corpus
        target: Option<String>,
        /// Seconds for each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Make the API's table of facts anew from a published OpenAPI document and discovery documents
    Facts {
        /// The OpenAPI v2 document
        swagger: std::path::PathBuf,
        /// Folder of discovery documents
        discovery: std::path::PathBuf,
        /// Where the table goes
        out: std::path::PathBuf,
    },
    /// Run kernel tests in emulated machines with Debian 12's own kernel
    Vm {
        /// Machines, or runs in them such as `v2/builtin`; all if none is named
        runs: Vec<String>,
        /// Names of tests, in place of those that a run chooses
        #[arg(last = true)]
        tests: Vec<String>,
    },
    /// Check which crate may use which
    Layers,
    /// Run a test program and end it when it hangs; `test` has cargo call this
    #[command(hide = true)]
    RunTest {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// The work within an emulated machine, which `vm` starts
    #[command(hide = true)]
    WorkInVm {
        /// The file that says what to do
        job: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().task {
        Task::Up => up::up(),
        Task::Down => up::down(),
        Task::Build { dev } => artifacts::build_all(!dev).map(|_| ()),
        Task::Test { args } => checks::test(&args),
        Task::Ci => checks::ci(),
        Task::Ebpf => artifacts::build_ebpf().map(|_| ()),
        Task::Images => images::build_all().and_then(|_| images::build_for_tests()),
        Task::Bench { args } => checks::bench(&args),
        Task::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
        Task::Facts { swagger, discovery, out } => facts::generate(&swagger, &discovery, &out),
        Task::Vm { runs, tests } => vm::run(&vm::Wish { runs, tests }),
        Task::WorkInVm { job } => vm::work_inside(&job),
        Task::Layers => layers::check(),
        Task::RunTest { command } => deadline::run(&command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
