use serde::{Deserialize, Serialize};

/// What a rank computes on, as far as memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Platform {
    Cpu,
    Cuda,
}

/// What a device does in a second at its peak, and the share of it that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Floating point operations of matrix products in the run's format.
    pub product_flops: f64,
    /// Of products in f32, which compensation sums up in.
    pub single_flops: f64,
    /// In f64, which compensation solves in.
    pub double_flops: f64,
    /// Bytes read from or written to the device's memory.
    pub memory_bytes: f64,
    /// Bytes that a rank sends to its neighbour.
    pub link_bytes: f64,
    /// Share of all of these that a run reaches, in `(0, 1]`.
    pub efficiency: f64,
}

/// A device to plan for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    pub platform: Platform,
    /// Memory of one rank; absent: nothing is said about whether a run fits.
    pub memory_bytes: Option<u64>,
    /// Absent: no times.
    pub rates: Option<Rates>,
}

impl Device {
    /// A CPU of which nothing is known.
    #[must_use]
    pub fn cpu() -> Self {
        Self { name: "cpu".to_owned(), platform: Platform::Cpu, memory_bytes: None, rates: None }
    }
}

/// Share of a GPU's peak that is planned with where nobody says better. An assumption: it is what well-kept training loops
/// report for products, and nothing here has been measured on a GPU.
pub const GPU_EFFICIENCY: f64 = 0.4;

/// A device of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KnownDevice {
    pub name: &'static str,
    pub memory_bytes: u64,
    pub rates: Rates,
}

/// Peak rates as the vendor's data sheets have them, without sparsity; bandwidth of NVLink in one direction.
pub const KNOWN_DEVICES: [KnownDevice; 2] = [
    // NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB: bf16 312 TFLOPS, FP32 19.5, FP64 9.7, 2,039 GB/s, NVLink 600 GB/s
    // both ways.
    KnownDevice {
        name: "a100",
        memory_bytes: 80 << 30,
        rates: Rates {
            product_flops: 312e12,
            single_flops: 19.5e12,
            double_flops: 9.7e12,
            memory_bytes: 2.039e12,
            link_bytes: 300e9,
            efficiency: GPU_EFFICIENCY,
        },
    },
    // NVIDIA H100 Tensor Core GPU data sheet, SXM 80 GB: bf16 1,979 TFLOPS with sparsity, half of it without, FP32 67, FP64 34,
    // 3.35 TB/s, NVLink 900 GB/s both ways.
    KnownDevice {
        name: "h100",
        memory_bytes: 80 << 30,
        rates: Rates {
            product_flops: 989.5e12,
            single_flops: 67e12,
            double_flops: 34e12,
            memory_bytes: 3.35e12,
            link_bytes: 450e9,
            efficiency: GPU_EFFICIENCY,
        },
    },
];

/// The device of the table with this name, such as `h100`.
#[must_use]
pub fn known_device(name: &str) -> Option<Device> {
    let known = KNOWN_DEVICES.iter().find(|known| known.name.eq_ignore_ascii_case(name))?;
    Some(Device {
        name: known.name.to_owned(),
        platform: Platform::Cuda,
        memory_bytes: Some(known.memory_bytes),
        rates: Some(known.rates),
    })
}
