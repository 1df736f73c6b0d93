// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Drives a disk of the card through first-stage tables of the IOMMU in front of it: what it does, it says with "ringwall" in front.
 *
 * It takes a function that driver_override gives it. The function's ring, buffers and interrupt page are mapped at addresses of their own.
 * The disk's first 32 KiB are written. */
#include <linux/blk_types.h>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/interrupt.h>
#include <linux/iommu.h>
#include <linux/module.h>
#include <linux/msi.h>
#include <linux/pci.h>
#include <linux/virtio_pci_modern.h>
#include <uapi/linux/virtio_blk.h>
#include <uapi/linux/virtio_config.h>
#include <uapi/linux/virtio_ring.h>

#define RING_IOVA 0x10000000ul
#define DATA_IOVA 0x1234567000ul
#define LARGE_IOVA 0x2000200000ul
#define HEADER_AT 0x800
#define STATUS_AT 0xa00
#define LARGE_ORDER (ilog2(SZ_2M) - PAGE_SHIFT)
#define LARGE_BYTES SZ_32K
#define QUEUE_SIZE 8
#define BOTH (IOMMU_READ | IOMMU_WRITE)

static unsigned int rounds = 40;
module_param(rounds, uint, 0644);
MODULE_PARM_DESC(rounds, "how often a page is mapped, used, unmapped and shown to be out of reach");

struct disk {
	struct virtio_pci_modern_device modern;
	struct device *dev;
	struct iommu_domain *domain;
	struct completion interrupted;
	void __iomem *doorbell;
	struct vring ring;
	u8 *rings, *pages[2];
	struct page *large;
	int irq;
	u16 sent;
	bool is_told; /* the last request's interrupt came */
};

static irqreturn_t interrupt(int irq, void *data)
{
	struct disk *disk = data;

	complete(&disk->interrupted);
	return IRQ_HANDLED;
}

/* Returns the request's status, -ETIMEDOUT when it does not end. */
static int request(struct disk *disk, u32 type, unsigned long iova, u32 size)
{
	struct virtio_blk_outhdr *header = (void *)(disk->rings + HEADER_AT);
	struct vring_desc *desc = disk->ring.desc;
	u8 *status = disk->rings + STATUS_AT;
	int wait;

	*header = (struct virtio_blk_outhdr){ .type = cpu_to_le32(type) };
	*status = 0xff;
	desc[0] = (struct vring_desc){ cpu_to_le64(RING_IOVA + HEADER_AT), cpu_to_le32(sizeof(*header)), VRING_DESC_F_NEXT, 1 };
	desc[1] = (struct vring_desc){ cpu_to_le64(iova), cpu_to_le32(size), VRING_DESC_F_NEXT, 2 };
	if (type != VIRTIO_BLK_T_OUT)
		desc[1].flags |= VRING_DESC_F_WRITE;
	desc[2] = (struct vring_desc){ cpu_to_le64(RING_IOVA + STATUS_AT), cpu_to_le32(1), VRING_DESC_F_WRITE, 0 };
	reinit_completion(&disk->interrupted);
	disk->ring.avail->ring[disk->sent % QUEUE_SIZE] = 0;
	wmb(); /* entry in front of index, index in front of doorbell */
	disk->ring.avail->idx = cpu_to_le16(++disk->sent);
	wmb();
	vp_iowrite16(0, disk->doorbell);
	for (wait = 0; wait < 2000 && le16_to_cpu(READ_ONCE(disk->ring.used->idx)) != disk->sent; wait++)
		usleep_range(100, 200);
	if (wait == 2000)
		return -ETIMEDOUT;
	disk->is_told = wait_for_completion_timeout(&disk->interrupted, HZ / 5);
	rmb(); /* index in front of what it speaks of */
	return *status;
}

/* Reads the first sector. */
static int fetch(struct disk *disk, unsigned long iova)
{
	return request(disk, VIRTIO_BLK_T_IN, iova, SECTOR_SIZE);
}

static int map(struct disk *disk, unsigned long iova, phys_addr_t address, size_t size, int rights)
{
	return iommu_map(disk->domain, iova, address, size, rights, GFP_KERNEL);
}

static void unmap(struct disk *disk, unsigned long iova, size_t size)
{
	if (iommu_unmap(disk->domain, iova, size) != size)
		dev_err(disk->dev, "failed: unmap of %#lx\n", iova);
}

/* Ends with -EIO when a request came to something else. */
#define EXPECT(what, wanted)                                                                            \
	do {                                                                                            \
		long found = (what);                                                                    \
		if (found != (wanted)) {                                                                \
			dev_err(disk->dev, "failed: line %d: " #what " is %ld\n", __LINE__, found);     \
			return -EIO;                                                                    \
		}                                                                                       \
	} while (0)

static int begin(struct disk *disk)
{
	struct virtio_pci_modern_device *modern = &disk->modern;
	int wait;

	vp_modern_set_status(modern, 0);
	for (wait = 0; wait < 1000 && vp_modern_get_status(modern); wait++)
		usleep_range(100, 200);
	vp_modern_set_status(modern, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
	vp_modern_set_features(modern, BIT_ULL(VIRTIO_F_VERSION_1) | BIT_ULL(VIRTIO_F_ACCESS_PLATFORM));
	vp_modern_set_status(modern, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK);
	EXPECT(vp_modern_get_status(modern) & VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_FEATURES_OK);
	EXPECT(vp_modern_queue_vector(modern, 0, 0), 0);
	vring_init(&disk->ring, QUEUE_SIZE, disk->rings, 64);
	vp_modern_set_queue_size(modern, 0, QUEUE_SIZE);
	vp_modern_queue_address(modern, 0, RING_IOVA, RING_IOVA + ((u8 *)disk->ring.avail - disk->rings),
				RING_IOVA + ((u8 *)disk->ring.used - disk->rings));
	disk->doorbell = vp_modern_map_vq_notify(modern, 0, NULL);
	EXPECT(!disk->doorbell, 0);
	vp_modern_set_queue_enable(modern, 0, true);
	vp_modern_set_status(modern, vp_modern_get_status(modern) | VIRTIO_CONFIG_S_DRIVER_OK);
	return 0;
}

/* The disk's name, then a sector that all 0x5a is, written from a page that can only be read: reading it to there is refused. */
static int rights(struct disk *disk)
{
	u8 *page = disk->pages[0];

	EXPECT(map(disk, DATA_IOVA, virt_to_phys(page), PAGE_SIZE, BOTH), 0);
	EXPECT(request(disk, VIRTIO_BLK_T_GET_ID, DATA_IOVA, VIRTIO_BLK_ID_BYTES), VIRTIO_BLK_S_OK);
	dev_info(disk->dev, "named %.20s\n", page);
	unmap(disk, DATA_IOVA, PAGE_SIZE);
	memset(page, 0x5a, SECTOR_SIZE);
	EXPECT(map(disk, DATA_IOVA, virt_to_phys(page), PAGE_SIZE, IOMMU_READ), 0);
	EXPECT(request(disk, VIRTIO_BLK_T_OUT, DATA_IOVA, SECTOR_SIZE), VIRTIO_BLK_S_OK);
	memset(page, 0, SECTOR_SIZE);
	EXPECT(fetch(disk, DATA_IOVA), VIRTIO_BLK_S_IOERR);
	EXPECT(memchr_inv(page, 0, SECTOR_SIZE) == NULL, 1);
	unmap(disk, DATA_IOVA, PAGE_SIZE);
	dev_info(disk->dev, "readonly\n");
	return 0;
}

/* One address, now this page, now that one, now none: what is written goes to the page of the moment. */
static int moves(struct disk *disk)
{
	unsigned int n;

	for (n = 0; n < rounds; n++) {
		u8 *here = disk->pages[n & 1], *there = disk->pages[~n & 1];

		memset(here, 0, PAGE_SIZE);
		memset(there, 0, PAGE_SIZE);
		EXPECT(map(disk, DATA_IOVA, virt_to_phys(here), PAGE_SIZE, BOTH), 0);
		EXPECT(fetch(disk, DATA_IOVA), VIRTIO_BLK_S_OK);
		EXPECT(memchr_inv(here, 0x5a, SECTOR_SIZE) == NULL, 1);
		EXPECT(memchr_inv(there, 0, PAGE_SIZE) == NULL, 1);
		memset(here, 0, PAGE_SIZE);
		unmap(disk, DATA_IOVA, PAGE_SIZE);
		EXPECT(fetch(disk, DATA_IOVA), VIRTIO_BLK_S_IOERR);
		EXPECT(memchr_inv(here, 0, PAGE_SIZE) == NULL, 1);
		EXPECT(memchr_inv(there, 0, PAGE_SIZE) == NULL, 1);
	}
	dev_info(disk->dev, "moved %u\n", n);
	return 0;
}

static int large(struct disk *disk)
{
	u8 *memory = page_address(disk->large);
	int n;

	for (n = 0; n < LARGE_BYTES; n++)
		memory[n] = n * 7 + (n >> 8);
	EXPECT(map(disk, LARGE_IOVA, page_to_phys(disk->large), SZ_2M, BOTH), 0);
	EXPECT(request(disk, VIRTIO_BLK_T_OUT, LARGE_IOVA, LARGE_BYTES), VIRTIO_BLK_S_OK);
	EXPECT(request(disk, VIRTIO_BLK_T_IN, LARGE_IOVA + SZ_2M - LARGE_BYTES, LARGE_BYTES), VIRTIO_BLK_S_OK);
	EXPECT(memcmp(memory, memory + SZ_2M - LARGE_BYTES, LARGE_BYTES), 0);
	unmap(disk, LARGE_IOVA, SZ_2M);
	EXPECT(request(disk, VIRTIO_BLK_T_IN, LARGE_IOVA, LARGE_BYTES), VIRTIO_BLK_S_IOERR);
	dev_info(disk->dev, "large %d\n", LARGE_BYTES);
	return 0;
}

/* Without its page an interrupt does not come; with it, the next one does. */
static int interrupts(struct disk *disk, unsigned long page)
{
	EXPECT(map(disk, DATA_IOVA, virt_to_phys(disk->pages[0]), PAGE_SIZE, BOTH), 0);
	EXPECT(fetch(disk, DATA_IOVA), VIRTIO_BLK_S_OK);
	EXPECT(disk->is_told, 1);
	unmap(disk, page, PAGE_SIZE);
	EXPECT(fetch(disk, DATA_IOVA), VIRTIO_BLK_S_OK);
	EXPECT(disk->is_told, 0);
	EXPECT(map(disk, page, page, PAGE_SIZE, IOMMU_WRITE | IOMMU_MMIO), 0);
	EXPECT(fetch(disk, DATA_IOVA), VIRTIO_BLK_S_OK);
	EXPECT(disk->is_told, 1);
	unmap(disk, DATA_IOVA, PAGE_SIZE);
	dev_info(disk->dev, "interrupts %#lx\n", page);
	return 0;
}

static int drive(struct disk *disk)
{
	struct msi_msg message;
	unsigned long page;
	int error;

	get_cached_msi_msg(disk->irq, &message);
	page = ((u64)message.address_hi << 32 | message.address_lo) & PAGE_MASK;
	EXPECT(map(disk, RING_IOVA, virt_to_phys(disk->rings), PAGE_SIZE, BOTH), 0);
	EXPECT(map(disk, page, page, PAGE_SIZE, IOMMU_WRITE | IOMMU_MMIO), 0);
	error = begin(disk);
	if (!error)
		error = rights(disk);
	if (!error)
		error = moves(disk);
	if (!error)
		error = large(disk);
	if (!error)
		error = interrupts(disk, page);
	vp_modern_set_status(&disk->modern, 0);
	return error;
}

static int translated(struct disk *disk)
{
	int error;

	disk->domain = iommu_paging_domain_alloc(disk->dev);
	if (IS_ERR(disk->domain))
		return PTR_ERR(disk->domain);
	error = iommu_attach_device(disk->domain, disk->dev);
	if (!error) {
		error = drive(disk);
		iommu_detach_device(disk->domain, disk->dev);
	}
	iommu_domain_free(disk->domain);
	return error;
}

static int probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct disk *disk = devm_kzalloc(&pdev->dev, sizeof(*disk), GFP_KERNEL);
	int error;

	if (!disk)
		return -ENOMEM;
	disk->dev = &pdev->dev;
	disk->modern.pci_dev = pdev;
	init_completion(&disk->interrupted);
	disk->rings = (u8 *)devm_get_free_pages(disk->dev, GFP_KERNEL | __GFP_ZERO, 0);
	disk->pages[0] = (u8 *)devm_get_free_pages(disk->dev, GFP_KERNEL, 0);
	disk->pages[1] = (u8 *)devm_get_free_pages(disk->dev, GFP_KERNEL, 0);
	disk->large = alloc_pages(GFP_KERNEL | __GFP_ZERO, LARGE_ORDER);
	error = -ENOMEM;
	if (!disk->rings || !disk->pages[0] || !disk->pages[1] || !disk->large)
		goto free;
	error = pci_enable_device(pdev);
	if (error)
		goto free;
	pci_set_master(pdev);
	error = vp_modern_probe(&disk->modern);
	if (error)
		goto disable;
	error = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSIX);
	if (error < 0)
		goto remove;
	disk->irq = pci_irq_vector(pdev, 0);
	error = request_irq(disk->irq, interrupt, 0, KBUILD_MODNAME, disk);
	if (error)
		goto vectors;
	error = translated(disk);
	free_irq(disk->irq, disk);
vectors:
	pci_free_irq_vectors(pdev);
remove:
	vp_modern_remove(&disk->modern);
disable:
	pci_disable_device(pdev);
free:
	if (disk->large)
		__free_pages(disk->large, LARGE_ORDER);
	dev_info(&pdev->dev, "ended %d\n", error);
	return error;
}

static struct pci_driver ringwall = { .name = KBUILD_MODNAME, .probe = probe };
module_pci_driver(ringwall);

MODULE_DESCRIPTION("A disk of the card behind first-stage tables");
MODULE_LICENSE("GPL");
